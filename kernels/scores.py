"""Attention scores of a prompt's keys: the attention each key receives from the prompt's last queries, without the
matrix of weights.

    score_j = Σ_i softmax_j(q_i·k_j/√D), summed over w queries and joined over the query heads of a KV head

This is the observation window of SnapKV (arXiv:2404.14469, §4). `_window_lse` finds the logsumexp of every query, and
`_window_scores` sums the columns. Each launch loads every tile of K once per query head: 2·S·D elements per KV head
if the L2 cache serves the heads after the first, 2·G·S·D if not. 4·S bytes are written.
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


@triton.jit
def _window_logits(
    q_ptr,
    k_ptr,
    offs_n,
    start,
    n_keys,
    n_queries,
    scale,
    sliding_window,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Return base-2 logits (BLOCK_M, BLOCK_N) of one head's queries for the keys offs_n; −inf where a query does not
    see a key.
    """
    offs_m, offs_d = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    q = tl.load(q_ptr + offs_m * HEAD_DIM + offs_d[None, :], mask=(offs_m < n_queries) & mask_d, other=0.0)
    k = tl.load(
        k_ptr + offs_n[:, None] * HEAD_DIM + offs_d[None, :], mask=(offs_n[:, None] < n_keys) & mask_d, other=0.0
    )
    q = _scale_queries(q, scale).to(COMPUTE_DTYPE)
    logits = tl.dot(q, tl.trans(k.to(COMPUTE_DTYPE)), input_precision="ieee")
    age = start + offs_m - offs_n[None, :]
    visible = (age >= 0) & (offs_m < n_queries) & (offs_n[None, :] < n_keys)
    if HAS_WINDOW:
        visible = visible & (age < sliding_window)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def _window_lse(
    q_ptr,
    k_ptr,
    lse_part_ptr,
    start,
    n_keys,
    n_queries,
    scale,
    sliding_window,
    HAS_WINDOW: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Compute the base-2 logsumexp of one query head's queries over one range of keys. The grid is (splits, query
    heads).
    """
    row = tl.program_id(1).to(tl.int64)
    splits, offs_m = tl.num_programs(0), tl.arange(0, BLOCK_M)
    start_n, end_n = _split_range(n_keys, splits, BLOCK_N)
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for tile_n in range(start_n, end_n, BLOCK_N):
        logits = _window_logits(
            q_ptr + row * n_queries * HEAD_DIM, k_ptr + row // HEADS_PER_KV * n_keys * HEAD_DIM,
            tile_n + tl.arange(0, BLOCK_N), start, n_keys, n_queries, scale, sliding_window,
            HAS_WINDOW=HAS_WINDOW, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, COMPUTE_DTYPE=COMPUTE_DTYPE,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        m_safe = _finite(m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(logits - m_safe[:, None]), 1)
        m_i = m_new
    _, lse = _normaliser(m_i, l_i)
    tl.store(lse_part_ptr + (row * splits + tl.program_id(0)) * n_queries + offs_m, lse, mask=offs_m < n_queries)


@triton.jit
def _window_scores(
    q_ptr,
    k_ptr,
    lse_ptr,
    scores_ptr,
    start,
    n_keys,
    n_queries,
    scale,
    sliding_window,
    HAS_WINDOW: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    OVER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Compute the scores of BLOCK_N keys of one KV head from all queries of its query heads. The grid is (key blocks,
    KV heads).
    """
    head, offs_m = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    score = tl.zeros([BLOCK_N], tl.float32)
    for g in range(HEADS_PER_KV):
        row = head * HEADS_PER_KV + g
        logits = _window_logits(
            q_ptr + row * n_queries * HEAD_DIM, k_ptr + head * n_keys * HEAD_DIM,
            offs_n, start, n_keys, n_queries, scale, sliding_window,
            HAS_WINDOW=HAS_WINDOW, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, COMPUTE_DTYPE=COMPUTE_DTYPE,
        )  # fmt: skip
        lse = tl.load(lse_ptr + row * n_queries + offs_m, mask=offs_m < n_queries, other=0.0)
        p = tl.sum(tl.exp2(logits - lse[:, None]), 0)
        score = tl.maximum(score, p) if OVER_GROUP == "max" else score + p / HEADS_PER_KV
    tl.store(scores_ptr + head * n_keys + offs_n, score, mask=offs_n < n_keys)


def attention_scores(
    q: Tensor,
    k: Tensor,
    start: int,
    sliding_window: int | None,
    over_group: str,
    over_queries: str = "sum",
    noise: tuple[int, float, int] | None = None,
) -> Tensor:
    """Score every key of a prompt by the attention of its last queries; the twin is `reference.attention_scores`.

    q (B,H,w,D) fp16, bf16 or fp32: the queries of tokens start … start+w−1; k (B,Hkv,S,D) in q's dtype: the keys of
    tokens 0 … S−1; sliding_window W: token i sees i−W+1 … i, None: 0 … i; over_group "mean" or "max": how the query
    heads of a KV head are joined. Returns (B,Hkv,S) fp32, summed over the w queries. Refuses (AssertionError)
    over_queries other than "sum", noise, and more than 128 queries.
    """
    B, H, w, D = q.shape
    heads, S = k.shape[1], k.shape[2]
    assert over_queries == "sum" and noise is None and w <= 128, (over_queries, noise, w)
    q, k, G = q.contiguous(), k.contiguous(), H // heads
    splits = n_splits(B * H, S, q.device, PER_PROCESSOR)
    common = {
        "start": start,
        "n_keys": S,
        "n_queries": w,
        "scale": softmax_scale(D),
        "sliding_window": sliding_window or 0,
        "HAS_WINDOW": sliding_window is not None,
        "HEADS_PER_KV": G,
        "HEAD_DIM": D,
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_M": max(16, triton.next_power_of_2(w)),
        "BLOCK_N": 64,
        "COMPUTE_DTYPE": triton_dtype(q.dtype),
    }
    lse_part = q.new_empty(B, H, splits, w, dtype=torch.float32)
    _window_lse[splits, B * H](q_ptr=q, k_ptr=k, lse_part_ptr=lse_part, **common)
    lse = (lse_part * LN2.value).logsumexp(2) / LN2.value  # every query sees itself, so none is −inf
    scores = q.new_empty(B, heads, S, dtype=torch.float32)
    _window_scores[triton.cdiv(S, 64), B * heads](
        q_ptr=q, k_ptr=k, lse_ptr=lse.contiguous(), scores_ptr=scores, OVER_GROUP=over_group, **common
    )
    return scores
