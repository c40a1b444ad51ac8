"""A backend: the functions that models and caches compute with, chosen once and passed along as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference import pack, rotate, unpack  # re-exported for stores and for model/rope.py

__all__ = ["Ops", "merge", "pack", "part_of", "rotate", "scored_by_kernel", "unpack"]


@dataclass(frozen=True)
class Ops:
    """One backend. Each function has the signature and the meaning of its namesake in `kernels/reference.py`, except
    where noted.
    """

    name: str
    prefill: Callable[..., Tensor]  # attention of a prompt or a part of it; returns no lse
    # attention and scores of a scoring pass; `reference.prefill_scored_by` has the signature
    prefill_scored: Callable[..., tuple[Tensor, Tensor]]
    # `reference.prefill` as it is, with lse, for parts that `merge` joins
    turn: Callable[..., tuple[Tensor, Tensor]]
    decode: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    decode_quant: Callable[..., tuple[Tensor, Tensor]]
    decode_ragged: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    attention_scores: Callable[..., Tensor]
    landmark_scores: Callable[..., Tensor]
    rebuild_keys: Callable[..., None]
    fetch_chunks: Callable[..., None]
    compact: Callable[..., tuple[Tensor, Tensor, Tensor]]
    take_slots: Callable[..., Tensor]
    take_lowest: Callable[..., tuple[Tensor, Tensor]]
    append: Callable[..., None]
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dequantize: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    device_gather: bool = False  # chunks are fetched and rebuilt on the device, without asking the host which ones
    has_kernels: bool = False  # of its own; `--backend auto` checks them before it uses them
    unpack_block: int | None = None  # so many tokens of a store that rounds exist as K and V at a time; None: all
    why: str = ""  # why this backend was chosen, where that is not plain
    decodes_fp8: Callable[[torch.dtype], bool] = lambda kind: False  # whether `decode` takes K and V of this 8-bit type


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(out (B,H,T,D), lse (B,H,T))] over disjoint sets of keys → the same over their union."""
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
    finite = lse.masked_fill(lse.isneginf(), 0)  # where a query sees no key at all
    out = sum(out.float() * (part_lse - finite).exp()[..., None] for out, part_lse in parts)
    return out.to(parts[0][0].dtype), lse


def part_of(length: Tensor | None, start: int, end: int) -> Tensor | None:
    """What `length` of `reference.decode`, a count per head or a mask, is for the slots start … end−1 alone."""
    if length is None or length.dim() == 3:
        return None if length is None else length[:, :, start:end]
    return (length - start).clamp(0, end - start)


def scored_by_kernel(over_group: str, over_queries: str, noise: object, near: int | None) -> bool:
    """Whether the kernel `attention_scores` joins scores in this way. Where it does not, torch computes them."""
    joins = over_queries == "sum" or over_group == over_queries == "max"
    return joins and noise is None and near is None
