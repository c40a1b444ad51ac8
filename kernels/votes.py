"""What every key of a prompt receives from its last queries, without the matrix of their attention.

    votes_j = Σ_i softmax_j(q_i·k_j/√D), summed over w queries, reduced over the G query heads of a KV head

Two launches read K once each: one finds every query's lse, one sums the columns. Bytes: 2·S·D elements per KV head, and S·4 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import LOG2E, stretches


@triton.jit
def _logits(
    q,
    k,
    s,
    start,
    S,
    w,
    scale,
    sliding_window,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """w queries of one head against the keys s, to the base 2; −inf where one does not see the other."""
    i, d = tl.arange(0, M), tl.arange(0, DP)
    a = tl.load(q + i[:, None] * D + d[None, :], mask=(i[:, None] < w) & (d[None, :] < D), other=0.0)
    b = tl.load(k + s[:, None] * D + d[None, :], mask=(s[:, None] < S) & (d[None, :] < D), other=0.0)
    x = tl.dot(
        (a.to(tl.float32) * tl.full([1, 1], scale, tl.float32)).to(COMPUTE),
        tl.trans(b.to(COMPUTE)),
        input_precision="ieee",
    )
    age = start + i[:, None] - s[None, :]
    seen = (age >= 0) & (i[:, None] < w) & (s[None, :] < S)
    if WINDOW:
        seen = seen & (age < sliding_window)
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _lse(
    q,
    k,
    part,
    start,
    S,
    w,
    scale,
    sliding_window,
    WINDOW: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Of one query head's rows over one stretch of keys."""
    row = tl.program_id(1).to(tl.int64)
    splits, i = tl.num_programs(0), tl.arange(0, M)
    each = tl.cdiv(tl.cdiv(S, splits), N) * N
    lo = tl.program_id(0) * each
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    for at in range(lo, tl.minimum(lo + each, S), N):
        x = _logits(
            q + row * w * D,
            k + row // G * S * D,
            at + tl.arange(0, N),
            start,
            S,
            w,
            scale,
            sliding_window,
            WINDOW,
            D,
            DP,
            M,
            COMPUTE,
        )
        above = tl.maximum(top, tl.max(x, 1))
        finite = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(x - finite[:, None]), 1)
        top = above
    tl.store(
        part + (row * splits + tl.program_id(0)) * w + i,
        tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total))),
        mask=i < w,
    )


@triton.jit
def _columns(
    q,
    k,
    lse,
    votes,
    start,
    S,
    w,
    scale,
    sliding_window,
    WINDOW: tl.constexpr,
    G: tl.constexpr,
    MAX: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """N keys of one KV head, from all queries of its G heads."""
    head, i = tl.program_id(1).to(tl.int64), tl.arange(0, M)
    s = tl.program_id(0) * N + tl.arange(0, N)
    found = tl.zeros([N], tl.float32)
    for g in range(G):
        row = head * G + g
        x = _logits(q + row * w * D, k + head * S * D, s, start, S, w, scale, sliding_window, WINDOW, D, DP, M, COMPUTE)
        whole = tl.load(lse + row * w + i, mask=i < w, other=0.0)
        mine = tl.sum(tl.exp2(x - whole[:, None]), 0)
        found = tl.maximum(found, mine) if MAX else found + mine / G
    tl.store(votes + head * S + s, found, mask=s < S)


def mass(
    q: Tensor,
    k: Tensor,
    start: int,
    sliding_window: int | None,
    group: str,
    stat: str = "sum",
    noise: tuple[int, float, int] | None = None,
) -> Tensor:
    """As `reference.mass` for stat sum without noise, of at most 128 queries."""
    B, H, w, D = q.shape
    heads, S = k.shape[1], k.shape[2]
    assert stat == "sum" and noise is None and w <= 128, (stat, noise, w)
    q, k, G = q.contiguous(), k.contiguous(), H // heads
    splits, M = stretches(B * H, S, q.device), max(16, triton.next_power_of_2(w))
    how = {"WINDOW": sliding_window is not None, "G": G, "D": D, "DP": triton.next_power_of_2(D), "M": M, "N": 64}
    how["COMPUTE"] = getattr(tl, str(q.dtype).removeprefix("torch."))
    numbers = start, S, w, D**-0.5 * LOG2E, sliding_window or 0
    part = q.new_empty(B, H, splits, w, dtype=torch.float32)
    _lse[splits, B * H](q, k, part, *numbers, **how)
    ln2 = 1 / LOG2E
    lse = (part * ln2).logsumexp(2) / ln2  # every query sees itself, so none is −inf
    votes = q.new_empty(B, heads, S, dtype=torch.float32)
    _columns[triton.cdiv(S, 64), B * heads](q, k, lse.contiguous(), votes, *numbers, MAX=group == "max", **how)
    return votes
