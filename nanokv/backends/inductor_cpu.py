"""A decode step's products, written so that Inductor makes one C++ loop of each: cast, multiply, add.

They are called only while compiling. Run as plain torch they would be slow and need much memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One thread that reads at one address waits for memory. On 2 cores of an Emerald Rapids the head's 57 MB were read at
# 15 GB/s from one address, and at 22, 27 and 29 GB/s from 2, 4 and 8 addresses at a time
N_PARALLEL_READS = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row x (…,C) times weight (N,C), plus bias (N,) → (…,N) in the weight's type; products and sums are fp32."""
    row = force_materialize(x.to(weight.dtype).float().flatten())
    out = torch.cat([(row * part.float()).sum(-1) for part in weight.chunk(N_PARALLEL_READS)])
    out = out if bias is None else out + bias.float()
    return out.to(weight.dtype).view(*x.shape[:-1], -1)


def decode(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token's attention: q (B,H,1,D), k and v (B,Hkv,S,D), visible (B,Hkv,1,S) → out (B,H,1,D), lse (B,H,1) fp32."""
    B, H, _, D = q.shape
    score = dots(q.view(B, k.shape[1], -1, D).float() * D**-0.5, k.float())  # (B,Hkv,G,S)
    if visible is not None:
        score = score.masked_fill(~visible, -torch.inf)
    largest = score.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest.isneginf(), 0)
    weight = (score - largest).exp()
    total = weight.sum(-1, keepdim=True)
    out = mix(weight, v.float()) / total.masked_fill(total == 0, 1)
    return out.to(q.dtype).view(q.shape), (largest + total.log()).view(B, H, 1)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """x (…,n,C) times y (…,S,C) transposed → (…,n,S). One loop over y serves all n rows of x."""
    x = force_materialize(x)
    return torch.stack([(x[..., i, None, :] * y).sum(-1) for i in range(x.shape[-2])], -2)


def mix(weight: Tensor, y: Tensor) -> Tensor:
    """weight (…,n,S) times y (…,S,C) → (…,n,C), by one loop over y too."""
    weight = force_materialize(weight)
    return torch.stack([(weight[..., i, :, None] * y).sum(-2) for i in range(weight.shape[-2])], -2)


def force_materialize(x: Tensor) -> Tensor:
    """Return x so that Inductor writes it to memory instead of computing it again in the loop that reads it.

    `as_strided` needs an address, so it has that effect.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
