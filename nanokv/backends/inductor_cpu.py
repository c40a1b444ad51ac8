"""The products of a decode step written out, so that torch.compile makes one loop on the CPU of each: cast, multiply, add up.

Called only while compiling (`ops`): run as they stand, they would be slow and large.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One thread that reads in one place waits for memory: on 2 cores of an Emerald Rapids the head's 57 MB came at 15 GB/s, and at 22, 27 and
# 29 GB/s in 2, 4 and 8 places at a time
STREAMS = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row x (…,C) times weight (N,C), plus bias (N,) → (…,N) in the weight's type; products and sums are fp32."""
    row = written(x.to(weight.dtype).float().flatten())
    out = torch.cat([(row * part.float()).sum(-1) for part in weight.chunk(STREAMS)])
    out = out if bias is None else out + bias.float()
    return out.to(weight.dtype).view(*x.shape[:-1], -1)


def decode(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token's attention: q (B,H,1,D), k and v (B,Hkv,S,D), seen (B,Hkv,1,S) → out (B,H,1,D), lse (B,H,1) fp32."""
    B, H, _, D = q.shape
    heads = k.shape[1]
    state = written(q.view(B, heads, -1, 1, D).float() * D**-0.5)
    # the queries of a group side by side in one loop over the keys, which are read once
    score = torch.stack([(state[:, :, g] * k.float()).sum(-1) for g in range(H // heads)], 2)  # (B,Hkv,G,S)
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    top = score.amax(-1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0)
    weight = (score - top).exp()
    total = weight.sum(-1, keepdim=True)
    out = torch.stack([(weight[:, :, g, :, None] * v.float()).sum(2) for g in range(H // heads)], 2)
    return (out / total.masked_fill(total == 0, 1)).to(q.dtype).view(q.shape), (top + total.log()).view(B, H, 1)


def written(x: Tensor) -> Tensor:
    """x, which Inductor then writes to memory instead of computing it anew in the loop that reads it: `as_strided` needs an address."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
