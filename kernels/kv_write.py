"""Writes of keys and values: the tokens that a policy keeps (compact), a new token's slot (take_slots, append), and
codes of a full group (quantize).

Each input element is read once and each output element written once. The quantisation is that of KIVI
(arXiv:2402.02750, Algorithm 1): K per channel and group of tokens, V per token and run of channels, with scales and
zero points in fp16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _compact(
    k_ptr,
    v_ptr,
    pos_ptr,
    index_ptr,
    kept_k_ptr,
    kept_v_ptr,
    kept_pos_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_pb,
    stride_ph,
    n_kept,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copy key, value and position of BLOCK_N kept tokens of one KV head. The grid is (blocks of kept tokens, KV
    heads, batch).
    """
    b, h, n_heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    offs_n, offs_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    kept = (b * n_heads + h) * n_kept + offs_n
    mask_n, mask_d = offs_n < n_kept, offs_d[None, :] < HEAD_DIM
    token = tl.load(index_ptr + kept, mask=mask_n, other=-1)
    mask_load, mask_store = (token >= 0)[:, None] & mask_d, mask_n[:, None] & mask_d
    k_ptr += b * stride_kb + h * stride_kh + token[:, None] * stride_ks + offs_d[None, :]
    v_ptr += b * stride_vb + h * stride_vh + token[:, None] * stride_vs + offs_d[None, :]
    pos_ptr += b * stride_pb + h * stride_ph + token
    kept_d = kept[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(kept_k_ptr + kept_d, tl.load(k_ptr, mask=mask_load, other=0.0), mask=mask_store)
    tl.store(kept_v_ptr + kept_d, tl.load(v_ptr, mask=mask_load, other=0.0), mask=mask_store)
    tl.store(kept_pos_ptr + kept, tl.load(pos_ptr, mask=mask_n & (token >= 0), other=-1), mask=mask_n)


def compact(k: Tensor, v: Tensor, pos: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the kept tokens of every KV head, in one launch; the twin is `reference.compact`.

    k and v (B,Hkv,S,D) of any dtype; pos (B,Hkv,S) int; index (B,Hkv,N) int64: which token goes to which place, −1:
    none. Returns k and v (B,Hkv,N,D) and pos (B,Hkv,N). Places without a token hold zeros and position −1. Refuses
    (AssertionError) k, v or pos whose last dimension is not contiguous.
    """
    (B, heads, N), D = index.shape, k.shape[3]
    assert k.stride(3) == v.stride(3) == pos.stride(2) == 1, (k.stride(), v.stride(), pos.stride())
    kept_k, kept_v, kept_pos = k.new_empty(B, heads, N, D), v.new_empty(B, heads, N, D), pos.new_empty(B, heads, N)
    if N:
        _compact[triton.cdiv(N, 32), heads, B](
            k_ptr=k,
            v_ptr=v,
            pos_ptr=pos,
            index_ptr=index.contiguous(),
            kept_k_ptr=kept_k,
            kept_v_ptr=kept_v,
            kept_pos_ptr=kept_pos,
            stride_kb=k.stride(0),
            stride_kh=k.stride(1),
            stride_ks=k.stride(2),
            stride_vb=v.stride(0),
            stride_vh=v.stride(1),
            stride_vs=v.stride(2),
            stride_pb=pos.stride(0),
            stride_ph=pos.stride(1),
            n_kept=N,
            HEAD_DIM=D,
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_N=32,
        )
    return kept_k, kept_v, kept_pos


@triton.jit
def _take_slots(
    cursor_ptr,
    limit_ptr,
    sink_ptr,
    first_ptr,
    pos_ptr,
    slot_pos_ptr,
    index_ptr,
    n_heads,
    n,
    BLOCK_N: tl.constexpr,
):
    """Give BLOCK_N of n heads (of all rows) a slot for their new token."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < n
    cursor = tl.load(cursor_ptr + offs_n, mask=mask, other=0)
    limit = tl.load(limit_ptr + offs_n, mask=mask, other=1)
    sink = tl.load(sink_ptr + offs_n, mask=mask, other=0)
    ring = sink + tl.maximum(cursor - sink, 0) % tl.maximum(limit - sink, 1)
    index = tl.load(first_ptr + offs_n, mask=mask, other=0) + tl.where(cursor < limit, cursor, ring)
    pos = tl.load(pos_ptr + offs_n // n_heads, mask=mask, other=0)
    tl.store(slot_pos_ptr + index, pos.to(tl.int32), mask=mask)
    tl.store(cursor_ptr + offs_n, cursor + 1, mask=mask)
    tl.store(index_ptr + offs_n, index, mask=mask)


def take_slots(cursor: Tensor, limit: Tensor, sink: Tensor, first: Tensor, pos: Tensor, slot_pos: Tensor) -> Tensor:
    """Give each head's new token the next slot of its ring, in one launch; the twin is `reference.take_slots`.

    cursor, limit and sink (B,Hkv) int32; first (B,Hkv,1) int64; pos (B,1) int; slot_pos (slots,) int32. Increases
    cursor by one, writes pos into slot_pos, and returns flat indices (B·Hkv,) int64. Refuses (AssertionError) tensors
    but pos that are not contiguous.
    """
    assert all(x.is_contiguous() for x in (cursor, limit, sink, first, slot_pos))
    pos = pos.contiguous()  # the last token of a turn is a column
    n, index = cursor.numel(), first.new_empty(cursor.numel())
    _take_slots[(triton.cdiv(n, 128),)](
        cursor_ptr=cursor,
        limit_ptr=limit,
        sink_ptr=sink,
        first_ptr=first,
        pos_ptr=pos,
        slot_pos_ptr=slot_pos,
        index_ptr=index,
        n_heads=cursor.shape[1],
        n=n,
        BLOCK_N=128,
        num_warps=1,
    )
    return index


@triton.jit
def _take_lowest(
    score_ptr,
    held_ptr,
    cursor_ptr,
    limit_ptr,
    first_ptr,
    pos_ptr,
    slot_pos_ptr,
    index_ptr,
    left_ptr,
    n_heads,
    n_slots,
    sliding_window,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Give the new token of one head of one row a slot."""
    i = tl.program_id(0).to(tl.int64)
    cursor, limit, pos = tl.load(cursor_ptr + i), tl.load(limit_ptr + i), tl.load(pos_ptr + i // n_heads).to(tl.int32)
    slot = tl.minimum(cursor, limit - 1)  # never outside the head
    if cursor >= limit:
        lowest, oldest = float("inf"), 2147483647
        for start in range(0, n_slots, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            held = tl.load(held_ptr + i * n_slots + offs_n, mask=offs_n < n_slots, other=-1)
            score = tl.load(score_ptr + i * n_slots + offs_n, mask=held >= 0, other=float("inf"))
            score = tl.where(score == score, score, float("-inf"))  # NaN compares with nothing
            if HAS_WINDOW:
                score = tl.where((held >= 0) & (held <= pos - sliding_window), float("-inf"), score)
            lowest_here = tl.min(score, 0)
            oldest_here = tl.min(tl.where((held >= 0) & (score == lowest_here), held, 2147483647), 0)
            if (lowest_here < lowest) | ((lowest_here == lowest) & (oldest_here < oldest)):
                lowest, oldest = lowest_here, oldest_here
                slot = tl.max(tl.where(held == oldest_here, offs_n, 0), 0)  # no two slots hold one token
    index = tl.load(first_ptr + i) + slot
    tl.store(left_ptr + i, tl.load(slot_pos_ptr + index))
    tl.store(slot_pos_ptr + index, pos)
    tl.store(cursor_ptr + i, cursor + 1)
    tl.store(index_ptr + i, index)


def take_lowest(
    score: Tensor,
    held: Tensor,
    cursor: Tensor,
    limit: Tensor,
    first: Tensor,
    pos: Tensor,
    slot_pos: Tensor,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    """Give each head's new token a free slot, or the one of the lowest score, in one launch; the twin is
    `reference.take_lowest`.

    score (B,Hkv,S) fp32; held (B,Hkv,S) int32; cursor and limit (B,Hkv) int32; first (B,Hkv,1) int64; pos (B,1) int;
    slot_pos (slots,) int32. Increases cursor by one, writes pos into slot_pos, and returns flat indices (B·Hkv,) int64
    and the positions (B·Hkv,) int32 of the tokens that leave. Refuses (AssertionError) several tokens at
    once, and tensors but pos, score and held that are not contiguous.
    """
    assert all(x.is_contiguous() for x in (cursor, limit, first, slot_pos)) and pos.shape[1] == 1, pos.shape
    score, held, pos = score.contiguous(), held.contiguous(), pos.contiguous()
    n, S = cursor.numel(), score.shape[2]
    index, left = first.new_empty(n), slot_pos.new_empty(n)
    _take_lowest[(n,)](
        score_ptr=score,
        held_ptr=held,
        cursor_ptr=cursor,
        limit_ptr=limit,
        first_ptr=first,
        pos_ptr=pos,
        slot_pos_ptr=slot_pos,
        index_ptr=index,
        left_ptr=left,
        n_heads=cursor.shape[1],
        n_slots=S,
        sliding_window=sliding_window or 0,
        HAS_WINDOW=sliding_window is not None,
        BLOCK_N=min(1024, triton.next_power_of_2(S)),
    )
    return index, left


@triton.jit
def _append(
    k_ptr,
    v_ptr,
    row_ptr,
    keys_ptr,
    values_ptr,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    n_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one new token of one KV head. The grid is (tokens, KV heads, batch)."""
    t, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    slot = tl.load(row_ptr + (b * tl.num_programs(1) + h) * n_tokens + t) * HEAD_DIM + offs_d
    k = tl.load(k_ptr + b * stride_kb + h * stride_kh + t * stride_kt + offs_d, mask=mask_d)
    tl.store(keys_ptr + slot, k.to(keys_ptr.dtype.element_ty), mask=mask_d)
    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + t * stride_vt + offs_d, mask=mask_d)
    tl.store(values_ptr + slot, v.to(values_ptr.dtype.element_ty), mask=mask_d)


def append(k: Tensor, v: Tensor, row: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write new tokens into their slots, in place and in one launch; the twin is `reference.append`.

    k and v (B,Hkv,T,D); row (B·Hkv·T,) int64: the slot of each; keys and values: the slots, seen as (slots,D), of any
    dtype. Refuses (AssertionError) k or v whose last dimension is not contiguous, and keys or values that are not
    contiguous.
    """
    B, heads, T, D = k.shape
    assert k.stride(3) == v.stride(3) == 1 and keys.is_contiguous() and values.is_contiguous(), (k.stride(), v.stride())
    _append[T, heads, B](
        k_ptr=k,
        v_ptr=v,
        row_ptr=row,
        keys_ptr=keys,
        values_ptr=values,
        stride_kb=k.stride(0),
        stride_kh=k.stride(1),
        stride_kt=k.stride(2),
        stride_vb=v.stride(0),
        stride_vh=v.stride(1),
        stride_vt=v.stride(2),
        n_tokens=T,
        HEAD_DIM=D,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=1,
    )


@triton.jit
def _half_up(x):
    """Round x ≥ 0 up to an fp16 number, at most 65,504; the twin is `reference._half_up`."""
    half = x.to(tl.float16)
    up = (x * 1.0009765625 + 5.960464477539063e-08).to(tl.float16)
    return tl.minimum(tl.where(half.to(tl.float32) < x, up, half).to(tl.float32), 65504.0)


@triton.jit
def _quantize(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    n_tokens,
    GROUP_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RUNS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Quantise GROUP_TOKENS tokens of one KV head. The grid is (groups of tokens, rows · KV heads).

    PER_CHANNEL: the tokens share one scale per channel. Otherwise each token has one scale per run of HEAD_DIM/RUNS
    channels.
    """
    group, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    token = group * GROUP_TOKENS + offs_n
    mask_n = ((offs_n < GROUP_TOKENS) & (token < n_tokens))[:, None]
    x_ptr += (line * n_tokens + token[:, None]) * HEAD_DIM + offs_d[None, :]
    x = tl.load(x_ptr, mask=mask_n, other=0.0).to(tl.float32)
    if PER_CHANNEL:
        lowest = tl.min(tl.where(mask_n, x, float("inf")), 0)[None, :]
        highest = tl.max(tl.where(mask_n, x, float("-inf")), 0)[None, :]
    else:
        runs = tl.reshape(x, [BLOCK_N, RUNS, HEAD_DIM // RUNS])
        lowest, highest = tl.min(runs, 2), tl.max(runs, 2)
    zero_half = tl.minimum(tl.maximum(lowest, -65504.0), 65504.0).to(tl.float16)
    zero = zero_half.to(tl.float32)
    lifted = tl.maximum(
        zero - lowest, 0.0
    )  # rounding may lift the zero point above the lowest number; scale/2 must cover that
    levels = tl.full([1, 1], 2.0**BITS - 1, tl.float32)  # div_rn takes tensors only
    scale = _half_up(tl.maximum(tl.div_rn(highest - zero, levels), 2 * lifted))
    scale = tl.where(scale == 0, 1.0, scale)
    if PER_CHANNEL:
        block = (line * tl.num_programs(0) + group) * HEAD_DIM + offs_d[None, :]
        tl.store(scale_ptr + block, scale.to(tl.float16))
        tl.store(zero_ptr + block, zero_half)
        scales, zeros = tl.broadcast_to(scale, [BLOCK_N, HEAD_DIM]), tl.broadcast_to(zero, [BLOCK_N, HEAD_DIM])
    else:
        block = (line * n_tokens + token[:, None]) * RUNS + tl.arange(0, RUNS)[None, :]
        tl.store(scale_ptr + block, scale.to(tl.float16), mask=mask_n)
        tl.store(zero_ptr + block, zero_half, mask=mask_n)
        scales = tl.broadcast_to(scale[:, :, None], [BLOCK_N, RUNS, HEAD_DIM // RUNS])
        zeros = tl.broadcast_to(zero[:, :, None], [BLOCK_N, RUNS, HEAD_DIM // RUNS])
        scales, zeros = tl.reshape(scales, [BLOCK_N, HEAD_DIM]), tl.reshape(zeros, [BLOCK_N, HEAD_DIM])
    # 1.5·2^23 has no mantissa bits left for fractions, so adding it rounds to the nearest integer, ties to even
    code = (tl.div_rn(x - zeros, scales) + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, 0.0), 2.0**BITS - 1).to(tl.int32)
    WORDS: tl.constexpr = HEAD_DIM // FIELDS
    shift = tl.arange(0, FIELDS) * BITS
    word = tl.sum(tl.reshape(code, [BLOCK_N, FIELDS, WORDS]) << shift[None, :, None], 1)
    words_ptr += (line * n_tokens + token[:, None]) * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(words_ptr, word.to(words_ptr.dtype.element_ty), mask=mask_n)


def quantize(x: Tensor, bits: int, tokens: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise x (…,S,D) in blocks of tokens × channels; the twin is `reference.quantize`.

    x is fp16, bf16 or fp32; bits is 2, 4 or 8. Returns words (…,S,W) as `reference.pack` lays them out, and scale and
    zero point (…,S/tokens,D/channels) fp16. Refuses (AssertionError) blocks with more than one token and more than
    one channel, and D that is not a power of two of 16 or more.
    """
    S, D = x.shape[-2:]
    per_channel = channels == 1
    assert (per_channel or tokens == 1) and D == triton.next_power_of_2(D) >= 16 and bits in (2, 4, 8), (x.shape, bits)
    x, fields = x.contiguous(), 1 if bits == 8 else 4
    words = x.new_empty(*x.shape[:-1], D // fields, dtype=torch.int16 if bits == 4 else torch.uint8)
    shape = (S // tokens, D) if per_channel else (S, D // channels)
    scale, zero = (x.new_empty(*x.shape[:-2], *shape, dtype=torch.float16) for _ in range(2))
    group = tokens if per_channel else 32
    if x.numel():
        _quantize[triton.cdiv(S, group), x.numel() // (S * D)](
            x_ptr=x,
            words_ptr=words,
            scale_ptr=scale,
            zero_ptr=zero,
            n_tokens=S,
            GROUP_TOKENS=group,
            BLOCK_N=triton.next_power_of_2(group),
            HEAD_DIM=D,
            RUNS=D // channels,
            PER_CHANNEL=per_channel,
            BITS=bits,
            FIELDS=fields,
        )
    return words, scale, zero
