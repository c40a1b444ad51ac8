"""Attention of one new token over all stored tokens (flash decoding; Dao et al. 2023, no arXiv id).

    out = Σ_s softmax_s(q·k_s/√D) v_s, and lse = ln Σ_s exp(q·k_s/√D)

One program reads one range of slots of one KV head for all query heads of that KV head, so K and V are read once:
2·S·D elements per KV head. Nothing of size S is written unless attention scores are asked for. A second launch merges
the ranges. The number of ranges follows from the capacity and their size from `length` on the device, so a captured
launch stays right while a cache grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import (
    LOG2E,
    _attend_range,
    _finite,
    _normaliser,
    _scale_queries,
    _split_range,
    counts_or_mask,
    merge_splits,
    n_splits,
    softmax_scale,
    triton_dtype,
)
from kernels.tuning import launch, query_rows


@triton.jit
def _decode_split(
    q_ptr,
    k_ptr,
    v_ptr,
    first_slot_ptr,
    length_ptr,
    mask_ptr,
    key_pos_ptr,
    query_pos_ptr,
    out_part_ptr,
    lse_part_ptr,
    logits_ptr,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_pb,
    stride_ph,
    n_slots,
    scale,
    sliding_window,
    IS_RAGGED: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WRITE_SCORES: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Attend over one range of slots of one KV head. The grid is (splits, KV heads, batch)."""
    b, h, splits = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    n_heads = tl.num_programs(1)
    n = tl.load(length_ptr + b * n_heads + h) if HAS_LENGTH else n_slots
    start_n, end_n = _split_range(n, splits, BLOCK_N)
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query_head = h * HEADS_PER_KV + offs_m
    mask_m, mask_d = offs_m < HEADS_PER_KV, offs_d[None, :] < HEAD_DIM
    q_ptr += b * stride_qb + query_head[:, None] * stride_qh + offs_d[None, :]
    q = _scale_queries(tl.load(q_ptr, mask=mask_m[:, None] & mask_d, other=0.0), scale).to(COMPUTE_DTYPE)
    k_ptr += b * stride_kb + h * stride_kh + offs_d[None, :]
    v_ptr += b * stride_vb + h * stride_vh + offs_d[None, :]
    mask_ptr += b * stride_mb + h * stride_mh
    key_pos_ptr += b * stride_pb + h * stride_ph
    min_pos = tl.load(query_pos_ptr + b) - sliding_window if HAS_WINDOW else 0
    if IS_RAGGED:  # the slots of all heads lie one behind the other
        first_slot = tl.load(first_slot_ptr + b * n_heads + h)
        k_ptr, v_ptr, key_pos_ptr = (
            k_ptr + first_slot * stride_ks,
            v_ptr + first_slot * stride_vs,
            key_pos_ptr + first_slot,
        )
    logits_ptr += (b * n_heads * HEADS_PER_KV + query_head[:, None]) * n_slots
    m_i, l_i, acc = _attend_range(
        q, k_ptr, v_ptr, stride_ks, stride_vs, start_n, end_n, mask_ptr, key_pos_ptr, min_pos, logits_ptr,
        HAS_MASK=HAS_MASK, HAS_WINDOW=HAS_WINDOW, WRITE_SCORES=WRITE_SCORES, HEADS_PER_KV=HEADS_PER_KV,
        BLOCK_M=BLOCK_M, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_N=BLOCK_N, COMPUTE_DTYPE=COMPUTE_DTYPE,
    )  # fmt: skip
    part = (b * n_heads * HEADS_PER_KV + query_head) * splits + tl.program_id(0)
    denominator, lse = _normaliser(m_i, l_i)
    out_part_ptr += part[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_part_ptr, acc / denominator[:, None], mask=mask_m[:, None] & mask_d)
    tl.store(lse_part_ptr + part, lse, mask=mask_m)


@triton.jit
def _decode_scores(
    logits_ptr,
    lse_ptr,
    scores_ptr,
    length_ptr,
    n_slots,
    HAS_LENGTH: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    OVER_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Turn base-2 logits and the natural lse of each query head into the attention that BLOCK_N slots received."""
    b, h, n_heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.load(length_ptr + b * n_heads + h) if HAS_LENGTH else n_slots
    score = tl.zeros([BLOCK_N], tl.float32)
    for g in tl.static_range(HEADS_PER_KV):
        row = (b * n_heads + h) * HEADS_PER_KV + g
        logits = tl.load(logits_ptr + row * n_slots + offs_n, mask=offs_n < n, other=float("-inf"))
        p = tl.exp2(logits - _finite(tl.load(lse_ptr + row) * LOG2E))
        if OVER_GROUP == "each":
            tl.store(scores_ptr + row * n_slots + offs_n, p, mask=offs_n < n_slots)
        elif OVER_GROUP == "max":
            score = tl.maximum(score, p)
        else:
            score += p / HEADS_PER_KV
    if OVER_GROUP != "each":
        tl.store(scores_ptr + (b * n_heads + h) * n_slots + offs_n, score, mask=offs_n < n_slots)


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
    """Attend from one new token per row to all stored tokens; the twin is `reference.decode`.

    q (B,H,1,D) fp16, bf16 or fp32; k and v (B,Hkv,S,D) in q's dtype or an 8-bit float; length (B,Hkv) int: the number
    of valid slots per head, or (B,Hkv,S) bool: which slots are valid, or None: all; key_pos (B,Hkv,S) and query_pos
    (B,1) int: absolute positions, read only if sliding_window is set (a key is visible if key_pos > query_pos −
    sliding_window). Returns out (B,H,1,D) in q's dtype, lse (B,H,1) fp32 (natural logsumexp; −inf where no key is
    visible, with out 0) and scores fp32: None, (B,Hkv,S) for over_group "mean" or "max", (B,H,S) for "each". Refuses
    (AssertionError) several tokens, noise, and q, k or v whose last dimension is not contiguous.
    """
    assert k.stride(3) == v.stride(3) == 1, (k.stride(), v.stride())
    counts, mask = counts_or_mask(length)
    strides = (*k.stride()[:3], *v.stride()[:3])
    return _launch(
        q, k, v, k.shape[1:3], strides, None, counts, mask, key_pos, query_pos, sliding_window, over_group, noise
    )


def decode_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[tuple[int, int]],
    first: Tensor,
    length: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    over_group: str | None = None,
    noise: tuple[int, float, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend as `decode` does, over KV heads that hold different numbers of tokens; the twin is
    `reference.decode_ragged`.

    k and v (slots,D) and key_pos (slots,): the slots of all (row, KV head) pairs, one pair behind the other; spans:
    the first slot and the number of slots of each pair, as the host knows them; first (B,Hkv,1) int: the same first
    slots on the device; length (B,Hkv) int: the number of valid slots, or None: all of the span. One launch serves
    all heads; the last programs of a short head do nothing. Returns what `decode` returns, with scores as wide as the
    longest span. Refuses (AssertionError) what `decode` refuses, and spans that are all empty.
    """
    longest, shape = max(n for _, n in spans), first.shape[:2]
    if length is None:
        length = torch.tensor([n for _, n in spans], dtype=torch.int32, device=q.device).view(shape)
    assert k.stride(1) == v.stride(1) == 1 and longest, (k.stride(), v.stride(), longest)
    strides, shape = (0, 0, k.stride(0), 0, 0, v.stride(0)), (shape[1], longest)
    return _launch(q, k, v, shape, strides, first, length, None, key_pos, query_pos, sliding_window, over_group, noise)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int],
    strides: tuple[int, ...],
    first: Tensor | None,
    counts: Tensor | None,
    mask: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    over_group: str | None,
    noise: tuple[int, float, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the kernels. shape is (KV heads, slots of the longest head); strides are those of k and then v: row,
    head, slot.

    A pointer that a flag switches off still needs a tensor: lse stands in.
    """
    (B, H, T, D), (heads, S) = q.shape, shape
    assert T == 1 and noise is None and q.stride(3) == 1, (q.shape, q.stride(), noise)
    # an 8-bit float becomes fp16 in one instruction, and bf16 in several: 33 for each cached token instead of 43 (sm_90)
    compute = torch.float16 if k.itemsize == 1 and q.dtype == torch.bfloat16 else q.dtype
    how = launch("decode" if k.itemsize > 1 else "decode of 8 bits", q.device)
    G, splits = H // heads, n_splits(B * heads, S, q.device, how.per_processor, how.block)
    out_part, lse_part = (q.new_empty(B, H, splits, n, dtype=torch.float32) for n in (D, 1))
    out, lse = q.new_empty(B, H, T, D), q.new_empty(B, H, T, dtype=torch.float32)
    logits = q.new_empty(B, H, S, dtype=torch.float32) if over_group else lse
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs = strides
    stride_mb, stride_mh = (0, 0) if mask is None else mask.stride()[:2]
    stride_pb, stride_ph = key_pos.stride()[:2] if first is None else (0, 0)
    _decode_split[splits, heads, B](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        first_slot_ptr=lse if first is None else first,
        length_ptr=lse if counts is None else counts,
        mask_ptr=lse if mask is None else mask,
        key_pos_ptr=key_pos,
        query_pos_ptr=query_pos,
        out_part_ptr=out_part,
        lse_part_ptr=lse_part,
        logits_ptr=logits,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_kb=stride_kb,
        stride_kh=stride_kh,
        stride_ks=stride_ks,
        stride_vb=stride_vb,
        stride_vh=stride_vh,
        stride_vs=stride_vs,
        stride_mb=stride_mb,
        stride_mh=stride_mh,
        stride_pb=stride_pb,
        stride_ph=stride_ph,
        n_slots=S,
        scale=softmax_scale(D),
        sliding_window=sliding_window or 0,
        IS_RAGGED=first is not None,
        HAS_LENGTH=counts is not None,
        HAS_MASK=mask is not None,
        HAS_WINDOW=sliding_window is not None,
        WRITE_SCORES=over_group is not None,
        HEADS_PER_KV=G,
        BLOCK_M=query_rows(G, is_packed=False),
        HEAD_DIM=D,
        BLOCK_D=triton.next_power_of_2(D),
        BLOCK_N=how.block,
        COMPUTE_DTYPE=triton_dtype(compute),
        num_warps=how.warps,
        num_stages=how.stages,
    )
    merge_splits(out_part, lse_part, out, lse)
    if over_group is None:
        return out, lse, None
    scores = q.new_empty(B, H if over_group == "each" else heads, S, dtype=torch.float32)
    _decode_scores[triton.cdiv(S, 256), heads, B](
        logits_ptr=logits,
        lse_ptr=lse,
        scores_ptr=scores,
        length_ptr=lse if counts is None else counts,
        n_slots=S,
        HAS_LENGTH=counts is not None,
        HEADS_PER_KV=G,
        OVER_GROUP=over_group,
        BLOCK_N=256,
    )
    return out, lse, scores
