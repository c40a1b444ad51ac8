"""Attention scores of a prompt's keys: the attention each key receives from a run of queries, without the matrix of
weights.

    score_j = Σ_i softmax_j(q_i·k_j/√D), summed over w queries and joined over the query heads of a KV head

With few queries this is the observation window of SnapKV (arXiv:2404.14469, §4). With all queries of a prompt it is
the score of H2O (arXiv:2306.14048), and with a maximum instead of the sum, over the queries of a scoring pass, that of
KVzip (arXiv:2505.23416). `_query_lse` finds the logsumexp of every query, and `_key_scores` joins the columns. A
program takes ROWS rows of queries at a time, of several query heads of a KV head if a head has fewer, so that a tile
of K serves them all: for G·w ≤ ROWS each launch reads K once, S·D elements per KV head. 4 bytes are written for each
score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import (
    LN2,
    _finite,
    _normaliser,
    _scale_queries,
    _split_range,
    n_splits,
    softmax_scale,
    triton_dtype,
)

PER_PROCESSOR = 2
ROWS = 128  # queries, of all heads together, that a program takes at a time
BLOCK = 64  # keys per tile


@triton.jit
def _load_queries(
    q_ptr,
    kv_row,
    first_head,
    first_query,
    n_queries,
    scale,
    HEADS_PER_KV: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Return the scaled queries (HEADS·BLOCK_Q, BLOCK_D), of HEADS query heads from first_head on and of each BLOCK_Q
    queries from first_query on, the row of each query among all queries of all heads, its number in its head, and which
    rows are queries.
    """
    offs_m, offs_d = tl.arange(0, HEADS * BLOCK_Q), tl.arange(0, BLOCK_D)[None, :]
    head, query = first_head + offs_m // BLOCK_Q, first_query + offs_m % BLOCK_Q
    mask_m = (query < n_queries) & (head < HEADS_PER_KV)
    row = (kv_row * HEADS_PER_KV + head) * n_queries + query
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)
    q = tl.load(q_ptr + row[:, None] * HEAD_DIM + offs_d, mask=mask, other=0.0)
    return _scale_queries(q, scale).to(COMPUTE_DTYPE), row, query, mask_m


@triton.jit
def _load_keys(
    k_ptr, offs_n, n_keys, stride_ks, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE_DTYPE: tl.constexpr
):
    """Return the keys offs_n as (BLOCK_N, BLOCK_D). k_ptr points at key 0 of one KV head."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_n[:, None] < n_keys) & (offs_d < HEAD_DIM)
    return tl.load(k_ptr + offs_n[:, None].to(tl.int64) * stride_ks + offs_d, mask=mask, other=0.0).to(COMPUTE_DTYPE)


@triton.jit
def _visible_logits(q, k, query, mask_m, offs_n, start, n_keys, sliding_window, HAS_WINDOW: tl.constexpr):
    """Return base-2 logits (rows, BLOCK_N), −inf where a query does not see a key."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    age = start + query[:, None] - offs_n[None, :]
    visible = (age >= 0) & mask_m[:, None] & (offs_n[None, :] < n_keys)
    if HAS_WINDOW:
        visible = visible & (age < sliding_window)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def _query_lse(
    q_ptr,
    k_ptr,
    lse_part_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    start,
    n_keys,
    n_queries,
    n_kv_heads,
    scale,
    sliding_window,
    HAS_WINDOW: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Compute the base-2 logsumexp of BLOCK_Q queries of HEADS query heads over one range of keys. The grid is (splits,
    blocks of query heads × blocks of queries, KV heads of all rows).
    """
    kv_row, splits = tl.program_id(2).to(tl.int64), tl.num_programs(0)
    query_blocks = tl.cdiv(n_queries, BLOCK_Q)
    first_head = tl.program_id(1) // query_blocks * HEADS
    first_query = tl.program_id(1) % query_blocks * BLOCK_Q
    start_n, end_n = _split_range(n_keys, splits, BLOCK_N)
    end_n = tl.minimum(end_n, start + first_query + BLOCK_Q)  # none of these queries sees a later key
    q, row, query, mask_m = _load_queries(
        q_ptr, kv_row, first_head, first_query, n_queries, scale,
        HEADS_PER_KV=HEADS_PER_KV, HEADS=HEADS, BLOCK_Q=BLOCK_Q, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D,
        COMPUTE_DTYPE=COMPUTE_DTYPE,
    )  # fmt: skip
    k_ptr += kv_row // n_kv_heads * stride_kb + kv_row % n_kv_heads * stride_kh
    m_i = tl.full([HEADS * BLOCK_Q], float("-inf"), tl.float32)
    l_i = tl.zeros([HEADS * BLOCK_Q], tl.float32)
    for tile_n in range(start_n, end_n, BLOCK_N):
        offs_n = tile_n + tl.arange(0, BLOCK_N)
        k = _load_keys(
            k_ptr, offs_n, n_keys, stride_ks, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, COMPUTE_DTYPE=COMPUTE_DTYPE
        )
        logits = _visible_logits(q, k, query, mask_m, offs_n, start, n_keys, sliding_window, HAS_WINDOW=HAS_WINDOW)
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        m_safe = _finite(m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(logits - m_safe[:, None]), 1)
        m_i = m_new
    _, lse = _normaliser(m_i, l_i)
    part = (row // n_queries * splits + tl.program_id(0)) * n_queries + query
    tl.store(lse_part_ptr + part, lse, mask=mask_m)


@triton.jit
def _key_scores(
    q_ptr,
    k_ptr,
    lse_ptr,
    scores_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    start,
    n_keys,
    n_queries,
    n_kv_heads,
    scale,
    sliding_window,
    HAS_WINDOW: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    OVER_GROUP: tl.constexpr,
    OVER_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Compute the scores of BLOCK_N keys of one KV head from all queries of its query heads. The grid is (key blocks,
    KV heads of all rows).
    """
    kv_row = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += kv_row // n_kv_heads * stride_kb + kv_row % n_kv_heads * stride_kh
    k = _load_keys(k_ptr, offs_n, n_keys, stride_ks, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, COMPUTE_DTYPE=COMPUTE_DTYPE)
    score = tl.zeros([BLOCK_N], tl.float32)
    lowest = tl.maximum(tl.program_id(0) * BLOCK_N - start, 0) // BLOCK_Q * BLOCK_Q  # earlier queries see none of these
    for first_head in range(0, HEADS_PER_KV, HEADS):
        of_head = tl.zeros([HEADS, BLOCK_N], tl.float32)
        for first_query in range(lowest, n_queries, BLOCK_Q):
            q, row, query, mask_m = _load_queries(
                q_ptr, kv_row, first_head, first_query, n_queries, scale,
                HEADS_PER_KV=HEADS_PER_KV, HEADS=HEADS, BLOCK_Q=BLOCK_Q, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D,
                COMPUTE_DTYPE=COMPUTE_DTYPE,
            )  # fmt: skip
            logits = _visible_logits(q, k, query, mask_m, offs_n, start, n_keys, sliding_window, HAS_WINDOW=HAS_WINDOW)
            p = tl.exp2(logits - tl.load(lse_ptr + row, mask=mask_m, other=0.0)[:, None])
            p = tl.reshape(p, [HEADS, BLOCK_Q, BLOCK_N])
            of_head = tl.maximum(of_head, tl.max(p, 1)) if OVER_QUERIES == "max" else of_head + tl.sum(p, 1)
        if OVER_GROUP == "each":
            head = first_head + tl.arange(0, HEADS)[:, None]
            at = (kv_row * HEADS_PER_KV + head) * n_keys + offs_n[None, :]
            tl.store(scores_ptr + at, of_head, mask=(head < HEADS_PER_KV) & (offs_n[None, :] < n_keys))
        elif OVER_GROUP == "max":
            score = tl.maximum(score, tl.max(of_head, 0))
        else:
            score += tl.sum(of_head, 0) / HEADS_PER_KV
    if OVER_GROUP != "each":
        tl.store(scores_ptr + kv_row * n_keys + offs_n, score, mask=offs_n < n_keys)


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
    """Score every key by the attention it receives from a run of queries; the twin is `reference.attention_scores`.

    q (B,H,w,D) fp16, bf16 or fp32: the queries of tokens start … start+w−1; k (B,Hkv,S,D) in q's dtype: the keys of
    tokens 0 … S−1; sliding_window W: token i sees i−W+1 … i, None: 0 … i; over_group "mean" or "max": how the query
    heads of a KV head are joined, or "each": they are not; over_queries "sum" or, of group "max", "max". Returns
    (B,Hkv,S) fp32, or (B,H,S) of group "each". Refuses (AssertionError) other ways to join, noise, near, and keys whose
    last dimension is not contiguous.
    """
    B, H, w, D = q.shape
    heads, S = k.shape[1], k.shape[2]
    asked = over_group, over_queries, noise, near
    assert (over_queries == "sum" or over_group == over_queries == "max") and noise is None and near is None, asked
    assert k.stride(3) == 1, k.stride()
    rows = (
        ROWS * 256 // max(256, triton.next_power_of_2(D) * q.itemsize)
    )  # rows of more than 256 bytes would not fit the shared memory
    q, G, block_q = q.contiguous(), H // heads, min(rows, triton.next_power_of_2(w))
    at_once = max(1, min(triton.next_power_of_2(G), rows // block_q))  # query heads
    if at_once * block_q < 16:  # a product has 16 rows at least
        block_q = 16 // at_once
    blocks = triton.cdiv(G, at_once) * triton.cdiv(w, block_q)
    splits = n_splits(B * heads * blocks, S, q.device, PER_PROCESSOR, BLOCK)
    common = {
        "stride_kb": k.stride(0),
        "stride_kh": k.stride(1),
        "stride_ks": k.stride(2),
        "start": start,
        "n_keys": S,
        "n_queries": w,
        "n_kv_heads": heads,
        "scale": softmax_scale(D),
        "sliding_window": sliding_window or 0,
        "HAS_WINDOW": sliding_window is not None,
        "HEADS_PER_KV": G,
        "HEADS": at_once,
        "BLOCK_Q": block_q,
        "HEAD_DIM": D,
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_N": BLOCK,
        "COMPUTE_DTYPE": triton_dtype(q.dtype),
    }
    lse_part = q.new_empty(B, H, splits, w, dtype=torch.float32)
    _query_lse[splits, blocks, B * heads](q_ptr=q, k_ptr=k, lse_part_ptr=lse_part, **common)
    lse = (lse_part * LN2.value).logsumexp(2) / LN2.value  # every query sees itself, so none is −inf
    scores = q.new_empty(B, H if over_group == "each" else heads, S, dtype=torch.float32)
    how = {"OVER_GROUP": over_group, "OVER_QUERIES": over_queries}
    _key_scores[triton.cdiv(S, BLOCK), B * heads](
        q_ptr=q, k_ptr=k, lse_ptr=lse.contiguous(), scores_ptr=scores, **how, **common, num_warps=8, num_stages=2
    )
    return scores
