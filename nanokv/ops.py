"""Backends: the functions that models and caches compute with, chosen once and passed along as a value.

EAGER is plain torch (`kernels.reference`), the oracle. SDPA is EAGER with attention handed to torch's fused kernels. This is
the only module that imports `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class Ops:
    """One backend. Signatures of the attention functions: `kernels/reference.py`."""

    name: str
    prefill: Callable[..., Tensor]  # a prompt or a chunk of one: out alone
    turn: Callable[..., tuple[Tensor, Tensor]]  # new tokens among themselves: out and lse, to merge with what is stored
    decode: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    mass: Callable[..., Tensor]
    norm: Callable[[Tensor, Tensor, float], Tensor]  # (x (…,C), weight (C,), eps) → (…,C)
    swiglu: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x (…,C), weight (N,C), bias (N,)) → (…,N)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim; x and weight fp32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…,C) in any type, computed and returned in the weight's."""
    return F.linear(x.to(weight.dtype), weight, bias)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, but one row goes to the matrix-vector routine: on some CPUs it streams bf16 weights up to twice as fast."""
    if x.numel() != x.shape[-1]:
        return linear(x, weight, bias)
    out = torch.mv(weight, x.to(weight.dtype).reshape(-1))
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def swiglu(gate_up: Tensor) -> Tensor:
    """(…,2C), the gate's half first → (…,C)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def eager_prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    return reference.prefill(q, k, v, start, sliding_window)[0]


def sdpa_prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    """As `reference.prefill` without lse. A whole prompt is one causal call; chunks and windows go in blocks of queries."""
    T = q.shape[2]
    if start == 0 and (sliding_window is None or sliding_window >= T):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    out = torch.empty_like(q)
    for rows, keys, seen in reference.blocks(T, start, sliding_window, q.device, MASKED_BLOCK):
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=seen, enable_gqa=True
        )
    return out


MASKED_BLOCK = 512  # queries per masked call: bounds the mask, and under a sliding window the keys read in vain


def sdpa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None,
    kpos: Tensor,
    now: Tensor,
    sliding_window: int | None,
    group: str | None = None,
    noise: tuple[int, float, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.decode`. On the CPU by torch's flash kernel, which also returns lse; it has no votes.

    The G query heads of a KV head become G·T queries of one head, so each key is read once.
    """
    B, H, T, D = q.shape
    some_see_nothing = sliding_window is not None and T > 1  # torch's kernel has no answer for such a row
    if group is not None or q.device.type != "cpu" or some_see_nothing:
        return reference.decode(q, k, v, length, kpos, now, sliding_window, group, noise)
    bias = None
    seen = reference.mask(length, kpos, now, sliding_window, k.shape[2])
    if seen is not None:
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(B, k.shape[1], -1, D), k, v, attn_mask=bias
    )
    out, lse = out.reshape(B, H, T, D), lse.reshape(B, H, T)
    if length is not None:  # nor for a head without tokens
        empty = (length == 0).repeat_interleave(H // k.shape[1], 1)[..., None]
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
    return out, lse, None


EAGER = Ops("eager", eager_prefill, reference.prefill, reference.decode, reference.mass, norm, swiglu, linear)
SDPA = replace(EAGER, name="sdpa", prefill=sdpa_prefill, decode=sdpa_decode)
BACKENDS = {"eager": EAGER, "sdpa": SDPA}


def merge(states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(out (B,H,T,D), lse (B,H,T))] over disjoint sets of keys → the same over their union."""
    lse = torch.stack([s[1] for s in states]).logsumexp(0)
    least = lse.masked_fill(lse.isneginf(), 0)  # where nothing at all is seen
    out = sum(o.float() * (l - least).exp()[..., None] for o, l in states)
    return out.to(states[0][0].dtype), lse
