"""Tokens into their places: what a policy keeps out of a prompt, a new token into its slot, a full group into codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _compact(
    k,
    v,
    pos,
    at,
    kept_k,
    kept_v,
    kept_pos,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    pos_b,
    pos_h,
    N,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
):
    """R kept tokens of one head: key, value and position."""
    b, h, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    n, d = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, DP)
    to = (b * heads + h) * N + n
    token = tl.load(at + to, mask=n < N, other=-1)
    real = (token >= 0)[:, None] & (d[None, :] < D)
    out = (n < N)[:, None] & (d[None, :] < D)
    key = tl.load(k + b * k_b + h * k_h + token[:, None] * k_s + d[None, :], mask=real, other=0.0)
    tl.store(kept_k + to[:, None] * D + d[None, :], key, mask=out)
    value = tl.load(v + b * v_b + h * v_h + token[:, None] * v_s + d[None, :], mask=real, other=0.0)
    tl.store(kept_v + to[:, None] * D + d[None, :], value, mask=out)
    tl.store(
        kept_pos + to, tl.load(pos + b * pos_b + h * pos_h + token, mask=(n < N) & (token >= 0), other=-1), mask=n < N
    )


def compact(k: Tensor, v: Tensor, pos: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.compact`, in one launch: each kept token is read once and written once."""
    (B, heads, N), D = at.shape, k.shape[3]
    assert k.stride(3) == v.stride(3) == pos.stride(2) == 1, (k.stride(), v.stride(), pos.stride())
    kept_k, kept_v, kept_pos = k.new_empty(B, heads, N, D), v.new_empty(B, heads, N, D), pos.new_empty(B, heads, N)
    strides = (*k.stride()[:3], *v.stride()[:3], *pos.stride()[:2])
    grid = triton.cdiv(N, 32), heads, B
    if N:
        _compact[grid](
            k, v, pos, at.contiguous(), kept_k, kept_v, kept_pos, *strides, N, D=D, DP=triton.next_power_of_2(D), R=32
        )
    return kept_k, kept_v, kept_pos


@triton.jit
def _append(k, v, row, keys, values, k_b, k_h, k_t, v_b, v_h, v_t, T, D: tl.constexpr, DP: tl.constexpr):
    """One head's one new token."""
    t, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, DP)
    to = tl.load(row + (b * tl.num_programs(1) + h) * T + t) * D + d
    key = tl.load(k + b * k_b + h * k_h + t * k_t + d, mask=d < D)
    tl.store(keys + to, key.to(keys.dtype.element_ty), mask=d < D)
    value = tl.load(v + b * v_b + h * v_h + t * v_t + d, mask=d < D)
    tl.store(values + to, value.to(values.dtype.element_ty), mask=d < D)


def append(k: Tensor, v: Tensor, row: Tensor, keys: Tensor, values: Tensor) -> None:
    """As `reference.append`, in one launch."""
    B, heads, T, D = k.shape
    assert k.stride(3) == v.stride(3) == 1 and keys.is_contiguous() and values.is_contiguous(), (k.stride(), v.stride())
    strides = (*k.stride()[:3], *v.stride()[:3])
    _append[T, heads, B](k, v, row, keys, values, *strides, T, D=D, DP=triton.next_power_of_2(D), num_warps=1)


@triton.jit
def _half_up(x):
    """As `reference._half_up`."""
    half = x.to(tl.float16)
    up = (x * 1.0009765625 + 5.960464477539063e-08).to(tl.float16)
    return tl.minimum(tl.where(half.to(tl.float32) < x, up, half).to(tl.float32), 65504.0)


@triton.jit
def _quantize(
    x,
    words,
    scale,
    zero,
    S,
    N: tl.constexpr,
    NP: tl.constexpr,
    D: tl.constexpr,
    RUNS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """N tokens of one head. TOGETHER: they share one scale per channel; else each has one per run of D/RUNS channels."""
    block, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, d = tl.arange(0, NP), tl.arange(0, D)
    token = block * N + n
    here = (n < N) & (token < S)
    a = tl.load(x + (line * S + token[:, None]) * D + d[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    if TOGETHER:
        least = tl.min(tl.where(here[:, None], a, float("inf")), 0)[None, :]
        most = tl.max(tl.where(here[:, None], a, float("-inf")), 0)[None, :]
    else:
        runs = tl.reshape(a, [NP, RUNS, D // RUNS])
        least, most = tl.min(runs, 2), tl.max(runs, 2)
    floor = tl.minimum(tl.maximum(least, -65504.0), 65504.0).to(tl.float16)
    base = floor.to(tl.float32)
    off = tl.maximum(base - least, 0.0)  # where rounding lifted the zero above the least, half a step must reach it
    step = _half_up(tl.maximum(tl.div_rn(most - base, tl.full([1, 1], 2.0**BITS - 1, tl.float32)), 2 * off))
    step = tl.where(step == 0, 1.0, step)
    if TOGETHER:
        line_of = line * tl.num_programs(0) + block
        tl.store(scale + line_of * D + d[None, :], step.to(tl.float16))
        tl.store(zero + line_of * D + d[None, :], floor)
        wide, low = tl.broadcast_to(step, [NP, D]), tl.broadcast_to(base, [NP, D])
    else:
        r = tl.arange(0, RUNS)
        to = (line * S + token[:, None]) * RUNS + r[None, :]
        tl.store(scale + to, step.to(tl.float16), mask=here[:, None])
        tl.store(zero + to, floor, mask=here[:, None])
        wide = tl.reshape(tl.broadcast_to(step[:, :, None], [NP, RUNS, D // RUNS]), [NP, D])
        low = tl.reshape(tl.broadcast_to(base[:, :, None], [NP, RUNS, D // RUNS]), [NP, D])
    # to the nearest, the even one of two: the sum has no bits left for fractions
    code = (tl.div_rn(a - low, wide) + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, 0.0), 2.0**BITS - 1).to(tl.int32)
    W: tl.constexpr = D // FIELDS
    shift = tl.arange(0, FIELDS) * BITS
    word = tl.sum(tl.reshape(code, [NP, FIELDS, W]) << shift[None, :, None], 1)
    w = tl.arange(0, W)
    tl.store(words + (line * S + token[:, None]) * W + w[None, :], word.to(words.dtype.element_ty), mask=here[:, None])


def quantize(x: Tensor, bits: int, tokens: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.quantize` where `tokens` or `channels` is 1 and D a power of two, at least 16: read once, written once."""
    S, D = x.shape[-2:]
    together = channels == 1
    assert (together or tokens == 1) and D == triton.next_power_of_2(D) >= 16 and bits in (2, 4, 8), (x.shape, bits)
    x, fields = x.contiguous(), 1 if bits == 8 else 4
    words = x.new_empty(*x.shape[:-1], D // fields, dtype=torch.int16 if bits == 4 else torch.uint8)
    shape = (S // tokens, D) if together else (S, D // channels)
    scale, zero = (x.new_empty(*x.shape[:-2], *shape, dtype=torch.float16) for _ in range(2))
    N = tokens if together else 32
    if x.numel():
        _quantize[triton.cdiv(S, N), x.numel() // (S * D)](
            x, words, scale, zero, S, N=N, NP=triton.next_power_of_2(N), D=D, RUNS=D // channels,
            TOGETHER=together, BITS=bits, FIELDS=fields,
        )  # fmt: skip
    return words, scale, zero
