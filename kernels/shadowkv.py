"""Sparse attention over chunks (ShadowKV, arXiv:2410.21465, §4): scores of the chunks' landmarks, keys rebuilt from
low-rank factors, and chunks fetched from wherever they lie, also from host memory.

The kernels skip chunks that the buffer holds already (is_new), so a captured step moves only what is new. For L
chunks of c tokens, of which n are new, a step reads per KV head L·D elements for the landmarks, n·c·r and r·D of the
factors, and n·c·D of the values. It writes 2·n·c·D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import _finite, _normaliser, _scale_queries, softmax_scale, triton_dtype

BLOCK = 64  # landmarks per program


@triton.jit
def _landmark_logits(
    q_ptr,
    landmarks_ptr,
    mask_ptr,
    logits_ptr,
    state_ptr,
    n_landmarks,
    scale,
    HAS_MASK: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Write base-2 logits of BLOCK_N landmarks of one KV head, and m_i and l_i of this block per query head.

    The grid is (landmark blocks, KV heads, batch). state (query heads, landmark blocks, 2) takes m_i and l_i.
    """
    h, b, n_heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    query_head, line = (b * n_heads + h) * HEADS_PER_KV + offs_m, (b * n_heads + h) * n_landmarks
    mask_m, mask_n, mask_d = offs_m < HEADS_PER_KV, offs_n < n_landmarks, offs_d[None, :] < HEAD_DIM
    q_ptr += query_head[:, None] * HEAD_DIM + offs_d[None, :]
    q = _scale_queries(tl.load(q_ptr, mask=mask_m[:, None] & mask_d, other=0.0), scale).to(COMPUTE_DTYPE)
    landmarks_ptr += (line + offs_n[:, None]) * HEAD_DIM + offs_d[None, :]
    landmarks = tl.load(landmarks_ptr, mask=mask_n[:, None] & mask_d, other=0.0).to(COMPUTE_DTYPE)
    logits = tl.dot(q, tl.trans(landmarks), input_precision="ieee")
    visible = mask_n
    if HAS_MASK:
        visible = visible & (tl.load(mask_ptr + line + offs_n, mask=mask_n, other=0) != 0)
    logits = tl.where(visible[None, :], logits, float("-inf"))
    logits_ptr += query_head[:, None] * n_landmarks + offs_n[None, :]
    tl.store(logits_ptr, logits, mask=mask_m[:, None] & mask_n[None, :])
    m_i = tl.max(logits, 1)
    l_i = tl.sum(tl.exp2(logits - _finite(m_i)[:, None]), 1)
    state_ptr += (query_head * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(state_ptr, m_i, mask=mask_m)
    tl.store(state_ptr + 1, l_i, mask=mask_m)


@triton.jit
def _landmark_scores(
    logits_ptr,
    state_ptr,
    scores_ptr,
    n_landmarks,
    n_blocks,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute softmax weights of BLOCK_N landmarks of one KV head, and keep the largest of its query heads."""
    h, b, n_heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    offs_n, offs_s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_STATES)
    mask_n, mask_s = offs_n < n_landmarks, offs_s < n_blocks
    score = tl.zeros([BLOCK_N], tl.float32)
    for g in tl.static_range(HEADS_PER_KV):
        query_head = (b * n_heads + h) * HEADS_PER_KV + g
        state = state_ptr + (query_head * n_blocks + offs_s) * 2
        m_part = tl.load(state, mask=mask_s, other=float("-inf"))
        l_part = tl.load(state + 1, mask=mask_s, other=0.0)
        m_i = _finite(tl.max(m_part, 0))
        denominator, _ = _normaliser(m_i, tl.sum(l_part * tl.exp2(m_part - m_i), 0))
        logits = tl.load(logits_ptr + query_head * n_landmarks + offs_n, mask=mask_n, other=float("-inf"))
        score = tl.maximum(score, tl.exp2(logits - m_i) / denominator)
    tl.store(scores_ptr + (b * n_heads + h) * n_landmarks + offs_n, score, mask=mask_n)


def landmark_scores(q: Tensor, landmarks: Tensor, visible: Tensor | None) -> Tensor:
    """Score every chunk by the attention its landmark receives from one new token; the twin is
    `reference.landmark_scores`.

    q (B,H,1,D) fp16, bf16 or fp32; landmarks (B,Hkv,L,D) in q's dtype; visible (B,Hkv,L) bool, or None: all. Returns
    (B,Hkv,L) fp32: the largest softmax weight of a KV head's query heads, and 0 in rows where no landmark is visible.
    Refuses (AssertionError) landmarks that are not contiguous.
    """
    (B, H, _, D), (heads, L) = q.shape, landmarks.shape[1:3]
    q, G, blocks = q.contiguous(), H // heads, triton.cdiv(L, BLOCK)
    assert landmarks.is_contiguous(), landmarks.stride()
    logits, state = (q.new_empty(B, H, n, dtype=torch.float32) for n in (L, 2 * blocks))
    scores = q.new_empty(B, heads, L, dtype=torch.float32)
    _landmark_logits[blocks, heads, B](
        q_ptr=q,
        landmarks_ptr=landmarks,
        mask_ptr=logits if visible is None else visible.contiguous(),  # logits stand in where there is no mask
        logits_ptr=logits,
        state_ptr=state,
        n_landmarks=L,
        scale=softmax_scale(D),
        HAS_MASK=visible is not None,
        HEADS_PER_KV=G,
        BLOCK_M=max(16, triton.next_power_of_2(G)),
        HEAD_DIM=D,
        BLOCK_D=triton.next_power_of_2(D),
        BLOCK_N=BLOCK,
        COMPUTE_DTYPE=triton_dtype(q.dtype),
    )
    _landmark_scores[triton.cdiv(L, 256), heads, B](
        logits_ptr=logits,
        state_ptr=state,
        scores_ptr=scores,
        n_landmarks=L,
        n_blocks=blocks,
        HEADS_PER_KV=G,
        BLOCK_STATES=triton.next_power_of_2(blocks),
        BLOCK_N=256,
    )
    return scores


@triton.jit
def _cos_sin(x):
    """Return cosine and sine of angles from 0 to 2^18.

    Three exact steps (Cody–Waite, constants of Cephes) reduce the angle to −π/4 … π/4, and polynomials do the rest.
    tl.cos takes any angle, and keeps an array on the stack for the large ones.
    """
    n = (x * 0.6366197723675814 + 12582912.0) - 12582912.0  # the nearest multiple of π/2
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = n.to(tl.int32)
    is_odd = (quadrant & 1) != 0
    c, s = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    return tl.where(((quadrant + 1) & 2) != 0, -c, c), tl.where((quadrant & 2) != 0, -s, s)


@triton.jit
def _rebuild_keys(
    a_ptr,
    b_ptr,
    inv_freq_ptr,
    first_ptr,
    chunk_ids_ptr,
    is_new_ptr,
    out_ptr,
    n_chunks,
    n_slots,
    rank,
    HAS_IS_NEW: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rebuild the keys of as many whole chunks of one KV head as fit into BLOCK_M rows: multiply A by B, then rotate
    to their positions.

    The grid is (chunk blocks, KV heads, batch). The two halves of a head's channels are computed apart, as RoPE pairs
    them.
    """
    h, row, n_heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    offs_m = tl.arange(0, BLOCK_M)
    slot, token = tl.program_id(0) * (BLOCK_M // CHUNK) + offs_m // CHUNK, offs_m % CHUNK
    mask_m = (slot < n_slots) & (offs_m < BLOCK_M // CHUNK * CHUNK)
    line = (row * n_heads + h) * n_slots + slot
    if HAS_IS_NEW:
        mask_m = mask_m & (tl.load(is_new_ptr + line, mask=mask_m, other=0) != 0)
    if tl.max(mask_m.to(tl.int32), 0) > 0:
        chunk = tl.maximum(tl.load(chunk_ids_ptr + line, mask=mask_m, other=0), 0).to(tl.int64)
        offs_r, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
        mask_d = offs_d < HALF_DIM
        low, high = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        a_rows = a_ptr + ((row * n_chunks + chunk) * CHUNK + token)[:, None] * rank
        b_head = b_ptr + (row * n_heads + h) * rank * 2 * HALF_DIM
        for tile_r in range(0, rank, BLOCK_R):
            mask_r = tile_r + offs_r < rank
            b_rows = b_head + (tile_r + offs_r)[:, None] * 2 * HALF_DIM
            a = tl.load(a_rows + tile_r + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            b = tl.load(b_rows + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
            low = tl.dot(a, b, low, input_precision="ieee")
            b = tl.load(b_rows + HALF_DIM + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
            high = tl.dot(a, b, high, input_precision="ieee")
        pos = tl.load(first_ptr + row) + chunk * CHUNK + token
        angle = pos.to(tl.float32)[:, None] * tl.load(inv_freq_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        cos, sin = _cos_sin(angle)
        key_ptr = out_ptr + (line * CHUNK + token)[:, None] * 2 * HALF_DIM + offs_d[None, :]
        mask_md = mask_m[:, None] & mask_d[None, :]
        tl.store(key_ptr, (low * cos - high * sin).to(out_ptr.dtype.element_ty), mask=mask_md)
        tl.store(key_ptr + HALF_DIM, (high * cos + low * sin).to(out_ptr.dtype.element_ty), mask=mask_md)


def rebuild_keys(
    a: Tensor,
    b: Tensor,
    inv_freq: Tensor,
    first: Tensor,
    chunk_ids: Tensor,
    is_new: Tensor | None,
    out: Tensor,
) -> None:
    """Compute the keys of whole chunks from their low-rank factors, in place; the twin is `reference.rebuild_keys`.

    a (B,C,c,r): a row per token of C chunks of c tokens; b (B,Hkv,r,D) in a's dtype; inv_freq (D/2,) fp32: RoPE's
    frequencies; first (B,) int: the position of token 0 of chunk 0; chunk_ids (B,Hkv,K) int: the chunk of each slot,
    negative: any; is_new (B,Hkv,K) bool: slots that are to be written, None: all; out (B,Hkv,K,c·D). A's rows are
    read through chunk_ids, and only finished keys are written. Refuses (AssertionError) a, b or out that are not
    contiguous.
    """
    (B, heads, K), (C, c, R), D = chunk_ids.shape, a.shape[1:], b.shape[3]
    assert a.is_contiguous() and b.is_contiguous() and out.is_contiguous(), (a.stride(), b.stride(), out.stride())
    block_m = max(32, triton.next_power_of_2(c))
    _rebuild_keys[triton.cdiv(K, block_m // c), heads, B](
        a_ptr=a,
        b_ptr=b,
        inv_freq_ptr=inv_freq,
        first_ptr=first,
        chunk_ids_ptr=chunk_ids.contiguous(),
        is_new_ptr=chunk_ids if is_new is None else is_new.contiguous(),  # chunk_ids stand in where all are new
        out_ptr=out,
        n_chunks=C,
        n_slots=K,
        rank=R,
        HAS_IS_NEW=is_new is not None,
        CHUNK=c,
        HALF_DIM=D // 2,
        BLOCK_D=max(16, triton.next_power_of_2(D // 2)),
        BLOCK_M=block_m,
        BLOCK_R=32,
        num_stages=3,
    )


@triton.jit
def _fetch_chunks(
    out_ptr,
    chunks_ptr,
    chunk_ids_ptr,
    is_new_ptr,
    n_chunks,
    n_slots,
    width,
    HAS_IS_NEW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copy one chunk of one KV head. The grid is (slots, KV heads, batch).

    There are as many programs as chunks, so that many reads are in flight at once: a link to host memory needs that.
    """
    slot, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n_heads = tl.num_programs(1)
    line = (b * n_heads + h) * n_slots + slot
    is_new = tl.load(is_new_ptr + line) != 0 if HAS_IS_NEW else True
    if is_new:
        chunk_ptr = chunks_ptr + ((b * n_heads + h) * n_chunks + tl.maximum(tl.load(chunk_ids_ptr + line), 0)) * width
        for tile_n in range(0, width, BLOCK_N):
            offs_n = tile_n + tl.arange(0, BLOCK_N)
            x = tl.load(chunk_ptr + offs_n, mask=offs_n < width, eviction_policy="evict_first")
            tl.store(out_ptr + line * width + offs_n, x, mask=offs_n < width)


def fetch_chunks(chunks: Tensor, chunk_ids: Tensor, is_new: Tensor | None, out: Tensor) -> None:
    """Copy whole chunks into the slots of a buffer, in place; the twin is `reference.fetch_chunks`.

    chunks (B,Hkv,C,W) of any dtype, on the device or in pinned host memory, which the kernel reads over the link
    itself; chunk_ids (B,Hkv,K) and is_new (B,Hkv,K) as for `rebuild_keys`; out (B,Hkv,K,W) on the device. Refuses
    (AssertionError) chunks or out that are not contiguous.
    """
    (B, heads, K), (C, W) = chunk_ids.shape, chunks.shape[2:]
    assert chunks.is_contiguous() and out.is_contiguous(), (chunks.stride(), out.stride())
    _fetch_chunks[K, heads, B](
        out_ptr=out,  # the first one: Inductor compiles for its device, and the chunks may lie on the host
        chunks_ptr=chunks,
        chunk_ids_ptr=chunk_ids.contiguous(),
        is_new_ptr=chunk_ids if is_new is None else is_new.contiguous(),  # chunk_ids stand in where all are new
        n_chunks=C,
        n_slots=K,
        width=W,
        HAS_IS_NEW=is_new is not None,
        BLOCK_N=min(1024, triton.next_power_of_2(W)),
    )
