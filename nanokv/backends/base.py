"""A backend: the functions that models and caches compute with, chosen once and passed along as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ops:
    """One backend. Signatures of the attention functions: `kernels/reference.py`."""

    name: str
    prefill: Callable[..., Tensor]  # a prompt or a chunk of one: out alone
    turn: Callable[..., tuple[Tensor, Tensor]]  # new tokens among themselves: out and lse, to merge with what is stored
    decode: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    decode_quant: Callable[..., tuple[Tensor, Tensor]]
    decode_ragged: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    mass: Callable[..., Tensor]
    landmarks: Callable[..., Tensor]
    rebuild: Callable[..., None]
    fetch: Callable[..., None]
    compact: Callable[..., tuple[Tensor, Tensor, Tensor]]
    append: Callable[..., None]
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dequantize: Callable[..., Tensor]
    norm: Callable[[Tensor, Tensor, float], Tensor]  # (x (…,C), weight (C,), eps) → (…,C)
    add_norm: Callable[
        [Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]
    ]  # (x, delta, weight, eps) → x + delta, its norm
    swiglu: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x (…,C), weight (N,C), bias (N,)) → (…,N)
    reads: Callable[[torch.dtype], bool] = lambda kind: (
        False
    )  # whether `decode` takes keys and values of this 8-bit type


def merge(states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(out (B,H,T,D), lse (B,H,T))] over disjoint sets of keys → the same over their union."""
    lse = torch.stack([s[1] for s in states]).logsumexp(0)
    least = lse.masked_fill(lse.isneginf(), 0)  # where nothing at all is seen
    out = sum(o.float() * (l - least).exp()[..., None] for o, l in states)
    return out.to(states[0][0].dtype), lse
