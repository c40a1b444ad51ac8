"""RMSNorm (arXiv:1910.07467, §4), RMSNorm of a sum, and SwiGLU (arXiv:2002.05202, §2) of the rows of a decode step.

One program per row, or per 1,024 columns of it; statistics in fp32. Each input is read once and each output written
once: 2·C elements per row for the norm, 4·C with the sum, and 3·C for SwiGLU with C outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    n_cols,
    eps,
    HAS_DELTA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalise one row; with HAS_DELTA first add delta and store the sum, rounded to its dtype."""
    row, offs_n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    x = tl.load(x_ptr + row * n_cols + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + row * n_cols + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * n_cols + offs_n, x, mask=mask_n)
        x = x.to(tl.float32)
    # Inductor passes a Python float as fp64; tl.full makes it fp32
    x = x * tl.rsqrt(tl.sum(x * x, 0) / n_cols + tl.full([1], eps, tl.float32))
    x = x * tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n_cols + offs_n, x.to(out_ptr.dtype.element_ty), mask=mask_n)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise x (…,C) by the root mean square over its last dimension, times weight (C,); the twin is
    `reference.rms_norm`.

    x and weight may be fp16, bf16 or fp32. Returns (…,C) in `dtype`, one of the same.
    """
    return _launch(x.contiguous(), None, weight, eps, dtype)[1]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x + delta (…,C), rounded to x's dtype, and its `rms_norm` in `dtype`, in one launch; the twin is
    `reference.add_rms_norm`.
    """
    return _launch(x.contiguous(), delta.contiguous(), weight, eps, dtype)


def _launch(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total, C = x if delta is None else torch.empty_like(x), weight.shape[0]
    out = torch.empty_like(x, dtype=dtype)
    block_n = triton.next_power_of_2(C)
    _rms_norm[(x.numel() // C,)](
        x_ptr=x,
        delta_ptr=x if delta is None else delta,  # x stands in where there is no delta
        weight_ptr=weight,
        sum_ptr=total,
        out_ptr=out,
        n_cols=C,
        eps=eps,
        HAS_DELTA=delta is not None,
        BLOCK_N=block_n,
        num_warps=min(8, max(1, block_n // 512)),
    )
    return total, out


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, n_cols, BLOCK_N: tl.constexpr):
    """Compute BLOCK_N columns of one row. The grid is (rows, column blocks)."""
    row, offs_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    gate = tl.load(gate_up_ptr + row * 2 * n_cols + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * n_cols + n_cols + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * n_cols + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return up · gate · sigmoid(gate) (…,C) of gate_up (…,2C), which holds the gate first; the twin is
    `reference.swiglu`.

    gate_up may be fp16, bf16 or fp32; the output has its dtype. C may be at most 65,535 · 1,024, the limit of CUDA's
    second grid dimension.
    """
    gate_up, C = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], C)
    _swiglu[gate_up.numel() // (2 * C), triton.cdiv(C, 1024)](gate_up_ptr=gate_up, out_ptr=out, n_cols=C, BLOCK_N=1024)
    return out
