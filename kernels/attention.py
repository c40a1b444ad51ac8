"""One token's attention over everything stored, the keys split over programs (flash decoding; Dao et al. 2023, no arXiv id).

    out = Σ_s softmax_s(q·k_s/√D) v_s, and lse = ln Σ_s exp(q·k_s/√D)

One program reads one stretch of one KV head's slots for all G query heads of that head: K and V cross the bus once, 2·S·D elements per
head, and nothing of size S is written unless votes are asked for. A second launch merges the stretches. How many stretches there are
follows from the capacity, their length from `length` on the device, so that a captured launch stays right as a cache grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
# Slots per tile, warps per program, programs per multiprocessor: the fastest on an H200 of 64 and 128 slots, 2, 4 and 8 warps, 2 to 4
# stages, 2 to 6 programs (16,384 tokens, 8 KV heads, G = 4, 1 and 8 rows: 23.3 and 124.7 us; 24.7 and 126.2 with 4 warps, 3 programs).
# 8-bit keys and values need the registers of 4 warps
BLOCK, WARPS, PER_PROCESSOR = 64, 2, 2


@triton.jit
def _stretch(n, splits, block: tl.constexpr):
    """Which slots are this program's: whole tiles, the same number for each."""
    each = tl.cdiv(tl.cdiv(n, splits), block) * block
    lo = tl.program_id(0) * each
    return lo, tl.minimum(lo + each, n)


@triton.jit
def read(
    state,
    keys,
    values,
    k_s,
    v_s,
    lo,
    hi,
    seen,
    kpos,
    since,
    logits,
    SEEN: tl.constexpr,
    WINDOW: tl.constexpr,
    VOTES: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Scaled queries (M,DP) over one head's slots lo … hi−1 → their greatest logit, summed exponentials (M,), to the base 2, and output."""
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    out = tl.zeros([M, DP], tl.float32)
    whole = lo + (hi - lo) // N * N if hi > lo else lo  # tiles without an end need no mask
    for at in range(lo, whole, N):
        top, total, out = _tile(
            state, keys, values, k_s, v_s, at, hi, seen, kpos, since, logits, top, total, out,
            SEEN, WINDOW, VOTES, False, G, M, D, DP, N, COMPUTE,
        )  # fmt: skip
    if whole < hi:
        top, total, out = _tile(
            state, keys, values, k_s, v_s, whole, hi, seen, kpos, since, logits, top, total, out,
            SEEN, WINDOW, VOTES, True, G, M, D, DP, N, COMPUTE,
        )  # fmt: skip
    return top, total, out


@triton.jit
def _tile(
    state,
    keys,
    values,
    k_s,
    v_s,
    at,
    hi,
    seen,
    kpos,
    since,
    logits,
    top,
    total,
    out,
    SEEN: tl.constexpr,
    WINDOW: tl.constexpr,
    VOTES: tl.constexpr,
    END: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """N slots more, of which the last tile has only those below hi."""
    g, s = tl.arange(0, M), at + tl.arange(0, N)
    wide = tl.arange(0, DP)[None, :] < D if D < DP else tl.full([1, DP], True, tl.int1)
    there = s < hi if END else tl.full([N], True, tl.int1)
    key = tl.load(keys + s[:, None] * k_s, mask=there[:, None] & wide, other=0.0).to(COMPUTE)
    x = tl.dot(state, tl.trans(key), input_precision="ieee")
    here = there
    if SEEN:
        here = here & (tl.load(seen + s, mask=there, other=0) != 0)
    if WINDOW:
        here = here & (tl.load(kpos + s, mask=there, other=0) > since)
    if SEEN or WINDOW or END:
        x = tl.where(here[None, :], x, float("-inf"))
    if VOTES:
        tl.store(logits + s[None, :], x, mask=(g[:, None] < G) & there[None, :])
    above = tl.maximum(top, tl.max(x, 1))
    finite = tl.where(above == float("-inf"), 0.0, above) if SEEN or WINDOW else above
    p, fade = tl.exp2(x - finite[:, None]), tl.exp2(top - finite)
    value = tl.load(values + s[:, None] * v_s, mask=there[:, None] & wide, other=0.0).to(COMPUTE)
    out = tl.dot(p.to(COMPUTE), value, out * fade[:, None], input_precision="ieee")
    return above, total * fade + tl.sum(p, 1), out


@triton.jit
def _split(
    q,
    k,
    v,
    first,
    length,
    seen,
    kpos,
    now,
    part,
    part_lse,
    logits,
    q_b,
    q_h,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    seen_b,
    seen_h,
    kpos_b,
    kpos_h,
    S,
    scale,
    sliding_window,
    RAGGED: tl.constexpr,
    LENGTH: tl.constexpr,
    SEEN: tl.constexpr,
    WINDOW: tl.constexpr,
    VOTES: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    b, h, splits = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    heads = tl.num_programs(1)
    n = tl.load(length + b * heads + h) if LENGTH else S
    lo, hi = _stretch(n, splits, N)
    g, d = tl.arange(0, M), tl.arange(0, DP)
    row = h * G + g
    wide = d[None, :] < D
    state = tl.load(q + b * q_b + row[:, None] * q_h + d[None, :], mask=(g[:, None] < G) & wide, other=0.0)
    state = (state.to(tl.float32) * tl.full([1, 1], scale, tl.float32)).to(COMPUTE)  # logits to the base 2
    keys, values = k + b * k_b + h * k_h + d[None, :], v + b * v_b + h * v_h + d[None, :]
    since = tl.load(now + b) - sliding_window if WINDOW else 0
    flags, when = seen + b * seen_b + h * seen_h, kpos + b * kpos_b + h * kpos_h
    if RAGGED:  # one head's slots behind the other's
        mine = tl.load(first + b * heads + h)
        keys, values, when = keys + mine * k_s, values + mine * v_s, when + mine
    lines = logits + (b * heads * G + row[:, None]) * S
    top, total, out = read(
        state, keys, values, k_s, v_s, lo, hi, flags, when, since, lines, SEEN, WINDOW, VOTES, G, M, D, DP, N, COMPUTE
    )
    to = (b * heads * G + row) * splits + tl.program_id(0)
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(part + to[:, None] * D + d[None, :], out, mask=(g[:, None] < G) & wide)
    tl.store(
        part_lse + to,
        tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total))),
        mask=g < G,
    )


@triton.jit
def _merge(part, part_lse, out, lse, splits, SP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """One query head's stretches → its output and natural lse."""
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SP), tl.arange(0, DP)
    here = (s[:, None] < splits) & (d[None, :] < D)
    each = tl.load(part_lse + row * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.max(each, 0)
    weight = tl.exp2(each - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    x = tl.load(part + (row * splits + s[:, None]) * D + d[None, :], mask=here, other=0.0)
    x = tl.sum(x * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * D + d, x.to(out.dtype.element_ty), mask=d < D)
    ln2 = 0.6931471805599453
    tl.store(lse + row, tl.where(total == 0, float("-inf"), (top + tl.log2(tl.where(total == 0, 1.0, total))) * ln2))


@triton.jit
def _votes(
    logits,
    lse,
    votes,
    length,
    S,
    LENGTH: tl.constexpr,
    G: tl.constexpr,
    REDUCE: tl.constexpr,
    N: tl.constexpr,
):
    """Logits and the whole softmax's lse → what each slot received, over the G heads by mean or max, or of each."""
    b, h, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    s = tl.program_id(0) * N + tl.arange(0, N)
    n = tl.load(length + b * heads + h) if LENGTH else S
    found = tl.zeros([N], tl.float32)
    for g in tl.static_range(G):
        row = (b * heads + h) * G + g
        x = tl.load(logits + row * S + s, mask=s < n, other=float("-inf"))
        whole = tl.load(lse + row) * 1.4426950408889634
        p = tl.exp2(x - tl.where(whole == float("-inf"), 0.0, whole))
        if REDUCE == "each":
            tl.store(votes + row * S + s, p, mask=s < S)
        elif REDUCE == "max":
            found = tl.maximum(found, p)
        else:
            found += p / G
    if REDUCE != "each":
        tl.store(votes + (b * heads + h) * S + s, found, mask=s < S)


def decode(
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
    """As `reference.decode` for one token (T = 1) and without noise; k and v of q's type or an 8-bit float, rows contiguous."""
    assert k.stride(3) == v.stride(3) == 1, (k.stride(), v.stride())
    seen = length if length is not None and length.dim() == 3 else None
    counts, strides = None if seen is not None else length, (*k.stride()[:3], *v.stride()[:3])
    return _attend(q, k, v, k.shape[1:3], strides, None, counts, seen, kpos, now, sliding_window, group, noise)


def decode_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[tuple[int, int]],
    first: Tensor,
    length: Tensor | None,
    kpos: Tensor,
    now: Tensor,
    sliding_window: int | None,
    group: str | None = None,
    noise: tuple[int, float, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.decode_ragged` for one token (T = 1) and without noise. One launch; a short head's last programs do nothing."""
    most, shape = max(n for _, n in spans), first.shape[:2]
    if length is None:
        length = torch.tensor([n for _, n in spans], dtype=torch.int32, device=q.device).view(shape)
    assert k.stride(1) == v.stride(1) == 1 and most, (k.stride(), v.stride(), most)
    strides, shape = (0, 0, k.stride(0), 0, 0, v.stride(0)), (shape[1], most)
    return _attend(q, k, v, shape, strides, first, length, None, kpos, now, sliding_window, group, noise)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int],
    strides: tuple[int, ...],
    first: Tensor | None,
    counts: Tensor | None,
    seen: Tensor | None,
    kpos: Tensor,
    now: Tensor,
    sliding_window: int | None,
    group: str | None,
    noise: tuple[int, float, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The launches. shape: KV heads, and slots of each at most; strides of k's and v's rows, heads and slots."""
    (B, H, T, D), (heads, S) = q.shape, shape
    assert T == 1 and noise is None and q.stride(3) == 1, (q.shape, q.stride(), noise)
    G, splits = H // heads, stretches(B * heads, S, q.device)
    M, DP = max(16, triton.next_power_of_2(G)), triton.next_power_of_2(D)
    part, part_lse = (q.new_empty(B, H, splits, n, dtype=torch.float32) for n in (D, 1))
    out, lse = q.new_empty(B, H, T, D), q.new_empty(B, H, T, dtype=torch.float32)
    logits = q.new_empty(B, H, S, dtype=torch.float32) if group else lse
    masks = (lse if x is None else x for x in (first, counts, seen))
    _split[splits, heads, B](
        q,
        k,
        v,
        *masks,
        kpos,
        now,
        part,
        part_lse,
        logits,
        *q.stride()[:2],
        *strides,
        *(seen.stride()[:2] if seen is not None else (0, 0)),
        *(kpos.stride()[:2] if first is None else (0, 0)),
        S,
        D**-0.5 * LOG2E,
        sliding_window or 0,
        RAGGED=first is not None,
        LENGTH=counts is not None,
        SEEN=seen is not None,
        WINDOW=sliding_window is not None,
        VOTES=group is not None,
        G=G,
        M=M,
        D=D,
        DP=DP,
        N=BLOCK,
        COMPUTE=getattr(tl, str(q.dtype).removeprefix("torch.")),
        num_warps=WARPS if k.itemsize > 1 else 4,
        num_stages=3,
    )
    _merge[(B * H,)](part, part_lse, out, lse, splits, SP=triton.next_power_of_2(splits), D=D, DP=DP)
    if group is None:
        return out, lse, None
    votes = q.new_empty(B, H if group == "each" else heads, S, dtype=torch.float32)
    known = lse if counts is None else counts
    _votes[triton.cdiv(S, 256), heads, B](
        logits, lse, votes, known, S, LENGTH=counts is not None, G=G, REDUCE=group, N=256
    )
    return out, lse, votes


def stretches(heads: int, S: int, device: torch.device, per_processor: int = PER_PROCESSOR) -> int:
    """In how many parts each head's S slots are read: as many as fill the device, none below 128 slots."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(
        1, min(round(per_processor * processors / heads), 63, triton.cdiv(S, 128))
    )  # and one for exact tokens beside codes
