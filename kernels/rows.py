"""What a decode step does to single rows: RMSNorm, SwiGLU, and a matrix times a vector, bound by the bytes of the matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(x, delta, weight, both, out, C, eps, ADD: tl.constexpr, W: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    here = c < C
    a = tl.load(x + row * C + c, mask=here, other=0.0).to(tl.float32)
    if ADD:
        a += tl.load(delta + row * C + c, mask=here, other=0.0).to(tl.float32)
        a = a.to(both.dtype.element_ty)
        tl.store(both + row * C + c, a, mask=here)
        a = a.to(tl.float32)
    a = a * tl.rsqrt(tl.sum(a * a, 0) / C + tl.full([1], eps, tl.float32))
    a = a * tl.load(weight + c, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, a.to(out.dtype.element_ty), mask=here)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.norm`. One program a row; statistics in fp32."""
    return _normed(x.contiguous(), None, weight, eps)[1]


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_norm`, in one launch."""
    return _normed(x.contiguous(), delta.contiguous(), weight, eps)


def _normed(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    both, out, C = x if delta is None else torch.empty_like(x), torch.empty_like(x), weight.shape[0]
    W = triton.next_power_of_2(C)
    _norm[(x.numel() // C,)](
        x, x if delta is None else delta, weight, both, out, C, eps, ADD=delta is not None, W=W,
        num_warps=min(8, max(1, W // 512)),
    )  # fmt: skip
    return both, out


@triton.jit
def _swiglu(x, out, C, N: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    here = c < C
    gate = tl.load(x + row * 2 * C + c, mask=here, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * C + C + c, mask=here, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * C + c, y.to(out.dtype.element_ty), mask=here)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu`."""
    x, C = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], C)
    _swiglu[x.numel() // (2 * C), triton.cdiv(C, 1024)](x, out, C, N=1024)  # of the second there are 65,535 at most
    return out


# Rows per program and the width of its tile: the fastest on an H200 for each matrix of llama3-8b, or within 1 % of it, of 1 to 16 rows,
# 512 to 2,048 columns, 4 and 8 warps (4,096 x 4,096: 3.1 TB/s, 2.9 with 8 x 512; 128,256 x 4,096: 4.6 and 4.4)
ROWS, WIDTH = 4, 2048


@triton.jit
def _linear(x, weight, bias, out, N, C, BIAS: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """R rows of the matrix, read once from left to right."""
    r, c = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, W)
    rows = weight + r[:, None].to(tl.int64) * C
    total = tl.zeros([R, W], tl.float32)
    for at in range(0, C, W):
        here = at + c < C
        part = tl.load(rows + at + c[None, :], mask=(r[:, None] < N) & here[None, :], other=0.0)
        total += part.to(tl.float32) * tl.load(x + at + c, mask=here, other=0.0).to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias + r, mask=r < N, other=0.0).to(tl.float32)
    tl.store(out + r, y.to(out.dtype.element_ty), mask=r < N)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `reference.linear` for one row: N·C weights cross the bus once, products and sums are fp32."""
    N, C = weight.shape
    assert x.numel() == C and weight.is_contiguous(), (x.shape, weight.stride())
    row, out = x.to(weight.dtype).contiguous(), weight.new_empty(*x.shape[:-1], N)
    _linear[(triton.cdiv(N, ROWS),)](
        row, weight, weight if bias is None else bias, out, N, C, BIAS=bias is not None, R=ROWS, W=WIDTH, num_warps=4
    )
    return out
