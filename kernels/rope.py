"""The rotation of queries and keys to their positions (RoPE, arXiv:2104.09864, §3.4), in rotate-half layout.

One program rotates some heads of one token. Each element is read once and written once: 2·n·D elements per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 4  # heads per program


@triton.jit
def _rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride_xb,
    stride_xt,
    stride_xn,
    n_tokens,
    n_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotate BLOCK_H heads of one token. The grid is (tokens of all rows, blocks of heads). BLOCK_D covers D/2."""
    token = tl.program_id(0).to(tl.int64)
    offs_h, offs_d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = HEAD_DIM // 2
    mask_d = offs_d < HALF
    mask = (offs_h[:, None] < n_heads) & mask_d[None, :]
    cos = tl.load(cos_ptr + token * HEAD_DIM + HALF + offs_d, mask=mask_d, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HEAD_DIM + HALF + offs_d, mask=mask_d, other=0.0)[None, :]
    x_ptr += (token // n_tokens) * stride_xb + (token % n_tokens) * stride_xt
    x_ptr += offs_h[:, None] * stride_xn + offs_d[None, :]
    low = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    out_ptr += (token * n_heads + offs_h[:, None]) * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptr, (low * cos - high * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + HALF, (high * cos + low * sin).to(out_ptr.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B,T,n,D) by the angles cos and sin (B,T,1,D) fp32; the twin is `reference.rotate`.

    x is fp16, bf16 or fp32. The two halves of cos must agree, and those of sin up to their sign, which is negative in
    the first half. Returns (B,T,n,D) in x's dtype, contiguous. Refuses (AssertionError) an odd D, x whose last
    dimension is not contiguous, and angles that are not contiguous.
    """
    B, T, n, D = x.shape
    assert D % 2 == 0 and x.stride(3) == 1 and cos.shape == sin.shape == (B, T, 1, D), (x.shape, x.stride(), cos.shape)
    assert cos.is_contiguous() and sin.is_contiguous(), (cos.stride(), sin.stride())
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate[B * T, triton.cdiv(n, HEADS)](
        x_ptr=x,
        cos_ptr=cos,
        sin_ptr=sin,
        out_ptr=out,
        stride_xb=x.stride(0),
        stride_xt=x.stride(1),
        stride_xn=x.stride(2),
        n_tokens=T,
        n_heads=n,
        HEAD_DIM=D,
        BLOCK_H=HEADS,
        BLOCK_D=triton.next_power_of_2(D // 2),
        num_warps=1,
    )
    return out
