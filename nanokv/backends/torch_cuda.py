"""Torch on a GPU, where no kernel of ours runs. K and V are read in their own type; they are never cast whole and never
repeated for their query heads.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from nanokv.backends.base import merge
from nanokv.backends.torch_cpu import MASKED_BLOCK, SDPA

HIDDEN = -3e4  # added to a logit that must not count: exp of it is 0 in every type, and all of them are no NaN
MAX_MASK = 1 << 26  # numbers in a mask
MIN_RANGE = 512  # keys of a range, at least
UNPACK_BLOCK = 4096  # quantised tokens that are unpacked at a time


@cache
def n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def has_flash(device: torch.device) -> bool:
    """Whether torch's flash kernel runs there: it needs compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


# ---- the three calls of torch that do the work; tests put others in their place, because these run on a GPU only -----


def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (N,h,M,D), k and v (N,h,S,D) of any strides in N, h and S; bias (N,h,M,S), added to the logits → out, lse."""
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
    return out, lse[:, :, : q.shape[2]]  # torch pads lse to multiples of 32


def causal_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q (B,H,T,D), the last T of the S tokens of k and v (B,Hkv,S,D) → out, lse."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)[:2]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N,M,C) times b (N,C,S), of 16 bits or fp32 → (N,M,S) fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32)


# ---- many tokens -----------------------------------------------------------------------------------------------------


def turn(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """As `reference.prefill`. Without a sliding window it is one call of torch's flash kernel."""
    (B, H, T, D), heads = q.shape, k.shape[1]
    is_whole = sliding_window is None or sliding_window >= k.shape[2]
    if is_whole and q.itemsize == 2 and D % 8 == 0 and D <= 256 and has_flash(q.device):
        return causal_flash(q, k, v)
    if D * q.itemsize % 16:  # the kernel reads 16 bytes at a time
        return reference.prefill(q, k, v, start, sliding_window)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for rows, keys, visible in reference.blocks(T, start, sliding_window, q.device, MASKED_BLOCK):
        # a KV head and its query heads: the same keys, with stride 0, for each of them
        part = q[:, :, rows].reshape(B * heads, H // heads, -1, D)
        k_part, v_part = (x[:, :, keys].flatten(0, 1)[:, None].expand(-1, H // heads, -1, -1) for x in (k, v))
        found, found_lse = efficient(part, k_part, v_part, bias_of(visible, part, k_part))
        out[:, :, rows], lse[:, :, rows] = found.reshape(B, H, -1, D), found_lse.reshape(B, H, -1)
    return out, lse


def prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    """As `reference.prefill` without lse. Torch chooses the kernel for a whole prompt."""
    T, is_mha = q.shape[2], q.shape[1] == k.shape[1]
    # of grouped heads torch would make a plain product with all logits where its flash kernel does not run
    fused = is_mha or (q.itemsize == 2 and has_flash(q.device))
    if fused and start == 0 and (sliding_window is None or sliding_window >= T):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    return turn(q, k, v, start, sliding_window)[0]


def bias_of(visible: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """visible, bool, that broadcasts to (N,h,M,S) → what `efficient` adds to the logits of q (N,h,M,D) and k (N,h,S,D).

    Its rows begin at multiples of 8 numbers, as the kernel demands, and it is not repeated where it broadcasts.
    """
    S = visible.shape[-1]
    bias = q.new_zeros(*visible.shape[:-1], -(-S // 8) * 8)[..., :S].masked_fill_(~visible, HIDDEN)
    return bias.expand(*q.shape[:3], k.shape[2])


# ---- decode steps ----------------------------------------------------------------------------------------------------


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    over_group: str | None = None,
    noise: tuple[int, float, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.decode`. The G query heads of a KV head are G·T queries of one head, so each key is read once.

    Of a single token the keys are cut into ranges, as many as fill the device, and the ranges are joined.
    """
    if over_group is not None or q.shape[3] * q.itemsize % 16:  # torch's kernel reads 16 bytes at a time
        given = q, k, v, length, key_pos, query_pos, sliding_window, over_group, noise
        return reference.decode_by(logits, values, *given)
    (B, H, T, D), (heads, S) = q.shape, k.shape[1:3]
    visible = reference.mask(length, key_pos, query_pos, sliding_window, S)  # (B,Hkv,1|T,S)
    block = max(1, min(MASKED_BLOCK, MAX_MASK // (B * H * S)))  # queries at a time, where each has its own mask
    if visible is not None and visible.shape[2] > 1 and block < T:
        rows = [slice(a, a + block) for a in range(0, T, block)]
        parts = [decode(q[:, :, r], k, v, length, key_pos, query_pos[:, r], sliding_window) for r in rows]
        return *(torch.cat(x, 2) for x in zip(*(p[:2] for p in parts), strict=True)), None
    if visible is not None:  # (B·Hkv,1,1|G·T,S)
        visible = visible.expand(B, heads, -1, -1).flatten(0, 1)[:, None]
        visible = visible.repeat(1, 1, H // heads, 1) if visible.shape[2] > 1 else visible
    folded, k, v = q.reshape(B * heads, 1, -1, D), k.flatten(0, 1), v.flatten(0, 1)
    ranges = min(2 * n_processors(q.device) // (B * heads), S // MIN_RANGE) if T == 1 else 1
    outs, lses = [], []
    for a, b, n in equal_ranges(S, max(1, ranges)):
        some_k, some_v = (x[:, a:b].unflatten(1, (n, -1)) for x in (k, v))  # (B·Hkv,n,keys,D), both are views
        some_q, bias = folded.expand(-1, n, -1, -1), None
        if visible is not None:
            mask = visible[..., a:b]
            bias = bias_of(mask[:, 0, 0].unflatten(1, (n, -1))[:, :, None] if n > 1 else mask, some_q, some_k)
        out, lse = efficient(some_q, some_k, some_v, bias)
        outs.append(out)
        lses.append(lse)
    out, lse = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (outs, lses))  # (B·Hkv,ranges,G·T,·)
    if out.shape[1] > 1:  # as `merge`, over a dim: every lse is finite here
        weight = lse.softmax(1)[..., None]
        out, lse = (out.float() * weight).sum(1).to(q.dtype), lse.logsumexp(1)
    out, lse = out.reshape(B, H, T, D), lse.reshape(B, H, T)
    if visible is not None:
        blind = lse < HIDDEN / 2  # no key is visible
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)
    return out, lse, None


def equal_ranges(n: int, ranges: int) -> list[tuple[int, int, int]]:
    """Cut n keys into equal ranges: (first key, one more than the last, number of ranges), with what is left over as a
    range of its own.
    """
    even = n // ranges * ranges
    return [(0, even, ranges)] + ([(even, n, 1)] if even < n else [])


def logits(q: Tensor, k: Tensor) -> Tensor:
    """q·k/√D, (B,Hkv,G,T,S) fp32."""
    (B, heads, _, D), T = k.shape, q.shape[2]
    found = product(q.reshape(B * heads, -1, D), k.flatten(0, 1).transpose(1, 2)) * D**-0.5
    return found.view(B, heads, -1, T, found.shape[2])


def values(weight: Tensor, v: Tensor) -> Tensor:
    """weight (B,Hkv,G,T,S) times v (B,Hkv,S,D): (B,H,T,D) fp32."""
    B, heads, G, T, S = weight.shape
    found = product(weight.to(v.dtype).reshape(B * heads, G * T, S), v.flatten(0, 1))
    return found.view(B, heads * G, T, -1)


def attention_scores(
    q: Tensor,
    k: Tensor,
    start: int,
    sliding_window: int | None,
    over_group: str,
    over_queries: str = "sum",
    noise: tuple[int, float, int] | None = None,
    near: int | None = None,
) -> Tensor:
    how = over_group, over_queries, noise, near
    return reference.attention_scores_by(logits, q, k, start, sliding_window, *how, reference.BLOCK)


def decode_quant(
    q: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    length: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    bits: tuple[int, int],
    exact: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.decode_quant`. Codes become keys and values a block of tokens at a time."""
    parts, group = [], k[0].shape[2] // k[1].shape[2]
    if exact is not None:
        parts.append(decode(q, *exact, query_pos, sliding_window)[:2])
    mask = None if length is None else reference.slot_mask(length, key_pos)  # once for all blocks
    block = max(group, UNPACK_BLOCK // group * group)
    for a in range(0, k[0].shape[2], block):
        tokens, groups = slice(a, a + block), slice(a // group, (a + block) // group)
        some_k = reference.dequantize(k[0][:, :, tokens], *(x[:, :, groups] for x in k[1:]), bits[0]).to(q.dtype)
        some_v = reference.dequantize(*(x[:, :, tokens] for x in v), bits[1]).to(q.dtype)
        visible = None if mask is None else mask[:, :, tokens]
        parts.append(decode(q, some_k, some_v, visible, key_pos[:, :, tokens], query_pos, sliding_window)[:2])
    return merge(parts) if len(parts) > 1 else parts[0]


TORCH_CUDA = replace(
    SDPA,
    prefill=prefill,
    prefill_scored=reference.prefill_scored_by(prefill, attention_scores),
    turn=turn,
    decode=decode,
    decode_quant=decode_quant,
    decode_ragged=reference.each_head(decode),
    attention_scores=attention_scores,
    unpack_block=UNPACK_BLOCK,
)
