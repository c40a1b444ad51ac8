"""A matrix times a vector (gemv): the linear layers of a decode step of one row. No paper.

Each program computes a few outputs and reads their rows of the matrix once from left to right, so the N·C weights
cross the bus once; that is all that bounds the time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.tuning import launch


@triton.jit
def _linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_cols,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M outputs, BLOCK_N columns of the matrix at a time."""
    offs_m, offs_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = weight_ptr + offs_m[:, None].to(tl.int64) * n_cols
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile_n in range(0, n_cols, BLOCK_N):
        mask_n = tile_n + offs_n < n_cols
        mask_mn = (offs_m[:, None] < n_rows) & mask_n[None, :]
        weight = tl.load(rows + tile_n + offs_n[None, :], mask=mask_mn, other=0.0)
        x = tl.load(x_ptr + tile_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc += weight.to(tl.float32) * x[None, :]
    out = tl.sum(acc, 1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + offs_m, mask=offs_m < n_rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m, out.to(out_ptr.dtype.element_ty), mask=offs_m < n_rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x·weightᵀ + bias for one row; the twin is `reference.linear`.

    x (1,…,1,C) in any dtype, rounded to the weight's first; weight (N,C) fp16, bf16 or fp32; bias (N,) or None.
    Products and sums are fp32. Returns (1,…,1,N) in the weight's dtype. Refuses (AssertionError) more than one row,
    and a weight that is not contiguous.
    """
    N, C = weight.shape
    assert x.numel() == C and weight.is_contiguous(), (x.shape, weight.stride())
    how = launch("linear", x.device)
    row, out = x.to(weight.dtype).contiguous(), weight.new_empty(*x.shape[:-1], N)
    _linear[(triton.cdiv(N, how.per_processor),)](
        x_ptr=row,
        weight_ptr=weight,
        bias_ptr=weight if bias is None else bias,  # the weight stands in where there is no bias
        out_ptr=out,
        n_rows=N,
        n_cols=C,
        HAS_BIAS=bias is not None,
        BLOCK_M=how.per_processor,
        BLOCK_N=how.block,
        num_warps=how.warps,
        num_stages=how.stages,
    )
    return out
