"""Chunks of which a step reads a few (ShadowKV, Sun et al. 2024, arXiv:2410.21465, §4): scores of their landmarks, keys rebuilt from
factors, values fetched from wherever they lie. What the buffer holds already is skipped on the device, so that a captured step moves only
what is new.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
BLOCK = 64  # landmarks per program


@triton.jit
def _scores(
    q,
    marks,
    seen,
    logits,
    part,
    L,
    scale,
    SEEN: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """N landmarks of one KV head for its G queries → logits to the base 2, and of this block the greatest and the exponentials' sum."""
    h, b, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    g, s, d = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, DP)
    row = (b * heads + h) * G + g
    wide, there = d[None, :] < D, s < L
    state = tl.load(q + row[:, None] * D + d[None, :], mask=(g[:, None] < G) & wide, other=0.0)
    state = (state.to(tl.float32) * tl.full([1, 1], scale, tl.float32)).to(COMPUTE)
    line = (b * heads + h) * L
    mark = tl.load(marks + (line + s[:, None]) * D + d[None, :], mask=there[:, None] & wide, other=0.0).to(COMPUTE)
    x = tl.dot(state, tl.trans(mark), input_precision="ieee")
    if SEEN:
        there = there & (tl.load(seen + line + s, mask=there, other=0) != 0)
    x = tl.where(there[None, :], x, float("-inf"))
    tl.store(logits + row[:, None] * L + s[None, :], x, mask=(g[:, None] < G) & (s[None, :] < L))
    top = tl.max(x, 1)
    total = tl.sum(tl.exp2(x - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)
    to = part + (row * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(to, top, mask=g < G)
    tl.store(to + 1, total, mask=g < G)


@triton.jit
def _greatest(logits, part, out, L, blocks, G: tl.constexpr, BP: tl.constexpr, N: tl.constexpr):
    """N landmarks of one KV head: the greatest of its query heads' softmax."""
    h, b, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    s, i = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, BP)
    best = tl.zeros([N], tl.float32)
    for g in tl.static_range(G):
        row = (b * heads + h) * G + g
        top = tl.load(part + (row * blocks + i) * 2, mask=i < blocks, other=float("-inf"))
        total = tl.load(part + (row * blocks + i) * 2 + 1, mask=i < blocks, other=0.0)
        most = tl.max(top, 0)
        most = tl.where(most == float("-inf"), 0.0, most)
        whole = tl.sum(total * tl.exp2(top - most), 0)
        x = tl.load(logits + row * L + s, mask=s < L, other=float("-inf"))
        best = tl.maximum(best, tl.exp2(x - most) / tl.where(whole == 0, 1.0, whole))
    tl.store(out + (b * heads + h) * L + s, best, mask=s < L)


def landmarks(q: Tensor, marks: Tensor, seen: Tensor | None) -> Tensor:
    """As `reference.landmarks`; of rows that see nothing, zeros."""
    (B, H, _, D), (heads, L) = q.shape, marks.shape[1:3]
    q, G, blocks = q.contiguous(), H // heads, triton.cdiv(L, BLOCK)
    assert marks.is_contiguous(), marks.stride()
    logits, part = (q.new_empty(B, H, n, dtype=torch.float32) for n in (L, 2 * blocks))
    out, hidden = q.new_empty(B, heads, L, dtype=torch.float32), logits if seen is None else seen.contiguous()
    M, DP = max(16, triton.next_power_of_2(G)), triton.next_power_of_2(D)
    _scores[blocks, heads, B](
        q, marks, hidden, logits, part, L, D**-0.5 * LOG2E, SEEN=seen is not None, G=G, M=M, D=D, DP=DP, N=BLOCK,
        COMPUTE=getattr(tl, str(q.dtype).removeprefix("torch.")),
    )  # fmt: skip
    _greatest[triton.cdiv(L, 256), heads, B](
        logits, part, out, L, blocks, G=G, BP=triton.next_power_of_2(blocks), N=256
    )
    return out


@triton.jit
def _cos_sin(x):
    """Of angles up to 2^18: turned into −π/4 … π/4 in three exact steps, then polynomials (Cephes). The library's own can take any angle,
    and keeps an array on the stack for it.
    """
    n = (x * 0.6366197723675814 + 12582912.0) - 12582912.0  # quarter turns
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = n.to(tl.int32)
    odd = (quarter & 1) != 0
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -c, c), tl.where((quarter & 2) != 0, -s, s)


@triton.jit
def _rebuild(
    a,
    b,
    inv_freq,
    first,
    ids,
    fresh,
    out,
    C,
    K,
    R,
    FRESH: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    HP: tl.constexpr,
    M: tl.constexpr,
    RB: tl.constexpr,
):
    """As many whole chunks of one KV head as M rows hold: rows of A times B, both halves of a head apart, turned to their places."""
    h, row, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    m = tl.arange(0, M)
    slot, token = tl.program_id(0) * (M // CHUNK) + m // CHUNK, m % CHUNK
    mine = (slot < K) & (m < M // CHUNK * CHUNK)
    line = (row * heads + h) * K + slot
    if FRESH:
        mine = mine & (tl.load(fresh + line, mask=mine, other=0) != 0)
    if tl.max(mine.to(tl.int32), 0) > 0:
        chunk = tl.maximum(tl.load(ids + line, mask=mine, other=0), 0).to(tl.int64)
        r, d = tl.arange(0, RB), tl.arange(0, HP)
        low, high = tl.zeros([M, HP], tl.float32), tl.zeros([M, HP], tl.float32)
        rows = a + ((row * C + chunk) * CHUNK + token)[:, None] * R
        cols = b + (row * heads + h) * R * 2 * HALF
        for at in range(0, R, RB):
            there = (at + r < R)[:, None] & (d < HALF)[None, :]
            x = tl.load(rows + at + r[None, :], mask=mine[:, None] & (at + r < R)[None, :], other=0.0)
            y = tl.load(cols + (at + r)[:, None] * 2 * HALF + d[None, :], mask=there, other=0.0)
            low = tl.dot(x, y, low, input_precision="ieee")
            y = tl.load(cols + (at + r)[:, None] * 2 * HALF + HALF + d[None, :], mask=there, other=0.0)
            high = tl.dot(x, y, high, input_precision="ieee")
        pos = tl.load(first + row) + chunk * CHUNK + token
        angle = pos.to(tl.float32)[:, None] * tl.load(inv_freq + d, mask=d < HALF, other=0.0)[None, :]
        cos, sin = _cos_sin(angle)
        to = out + (line * CHUNK + token)[:, None] * 2 * HALF + d[None, :]
        kept = mine[:, None] & (d < HALF)[None, :]
        tl.store(to, (low * cos - high * sin).to(out.dtype.element_ty), mask=kept)
        tl.store(to + HALF, (high * cos + low * sin).to(out.dtype.element_ty), mask=kept)


def rebuild(
    a: Tensor, b: Tensor, inv_freq: Tensor, first: Tensor, ids: Tensor, fresh: Tensor | None, out: Tensor
) -> None:
    """As `reference.rebuild`. A's rows are read by their numbers; nothing but the finished keys is written."""
    (B, heads, K), (C, c, R), D = ids.shape, a.shape[1:], b.shape[3]
    assert a.is_contiguous() and b.is_contiguous() and out.is_contiguous(), (a.stride(), b.stride(), out.stride())
    M, HP = max(32, triton.next_power_of_2(c)), max(16, triton.next_power_of_2(D // 2))
    _rebuild[triton.cdiv(K, M // c), heads, B](
        a, b, inv_freq, first, ids.contiguous(), ids if fresh is None else fresh.contiguous(), out, C, K, R,
        FRESH=fresh is not None, CHUNK=c, HALF=D // 2, HP=HP, M=M, RB=32, num_stages=3,
    )  # fmt: skip


@triton.jit
def _fetch(chunks, ids, fresh, out, C, K, W, FRESH: tl.constexpr, N: tl.constexpr):
    """One chunk of one KV head, a program: many are under way at a time, as a link to the host's memory needs."""
    s, h, b, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    line = (b * heads + h) * K + s
    wanted = tl.load(fresh + line) != 0 if FRESH else True
    if wanted:
        source = chunks + ((b * heads + h) * C + tl.maximum(tl.load(ids + line), 0)) * W
        for at in range(0, W, N):
            n = at + tl.arange(0, N)
            tl.store(out + line * W + n, tl.load(source + n, mask=n < W, eviction_policy="evict_first"), mask=n < W)


def fetch(chunks: Tensor, ids: Tensor, fresh: Tensor | None, out: Tensor) -> None:
    """As `reference.fetch`. chunks on the device, or in pinned memory of the host, which the kernel reads over the link itself."""
    (B, heads, K), (C, W) = ids.shape, chunks.shape[2:]
    assert chunks.is_contiguous() and out.is_contiguous(), (chunks.stride(), out.stride())
    _fetch[K, heads, B](
        chunks, ids.contiguous(), ids if fresh is None else fresh.contiguous(), out, C, K, W,
        FRESH=fresh is not None, N=min(1024, triton.next_power_of_2(W)),
    )  # fmt: skip
