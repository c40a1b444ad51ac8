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
    heads = k.shape[1]
    scaled_q = force_materialize(q.view(B, heads, -1, 1, D).float() * D**-0.5)
    # one loop over the keys serves all queries of a group, so each key is read once
    score = torch.stack([(scaled_q[:, :, g] * k.float()).sum(-1) for g in range(H // heads)], 2)  # (B,Hkv,G,S)
    weight, total, lse = _softmax(score, visible)
    out = torch.stack([(weight[:, :, g, :, None] * v.float()).sum(2) for g in range(H // heads)], 2)
    return (out / total).to(q.dtype).view(q.shape), lse.view(B, H, 1)


def decode_quant(
    q: Tensor,
    k: tuple[list[Tensor], Tensor, Tensor],
    v: tuple[list[Tensor], Tensor, Tensor],
    visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token's attention over codes → out and lse, as `decode`.

    k and v: a list of fields, which are the codes of consecutive channels as numbers (B,Hkv,S,D/fields), then scale and
    zero point: of K (B,Hkv,groups,D), one per group of tokens and channel; of V (B,Hkv,S,1), one per token.
    """
    (k_codes, ks, kz), (v_codes, vs, vz) = k, v
    B, H, _, D = q.shape
    heads, groups = ks.shape[1:3]
    scaled_q = q.view(B, heads, -1, 1, D).float() * D**-0.5
    in_fields = force_materialize(scaled_q * ks.float()[:, :, None]).chunk(len(k_codes), -1)  # (B,Hkv,G,groups,·) each
    offset = force_materialize((scaled_q * kz.float()[:, :, None]).sum(-1, keepdim=True))  # (B,Hkv,G,groups,1)
    grouped = [codes.unflatten(2, (groups, -1)) for codes in k_codes]
    score = torch.stack(
        [
            sum(part[:, :, g, :, None] * codes for part, codes in zip(in_fields, grouped, strict=True)).sum(-1)
            for g in range(H // heads)
        ],
        2,
    )  # (B,Hkv,G,groups,tokens)
    weight, total, lse = _softmax((score + offset).flatten(3), visible)
    scaled = force_materialize(weight * vs.float()[:, :, None, :, 0])
    out = [torch.stack([(scaled[:, :, g, :, None] * codes).sum(2) for g in range(H // heads)], 2) for codes in v_codes]
    zero = (weight * vz.float()[:, :, None, :, 0]).sum(-1, keepdim=True)
    return ((torch.cat(out, -1) + zero) / total).to(q.dtype).view(q.shape), lse.view(B, H, 1)


def _softmax(score: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """score (B,Hkv,G,S) → numerators (B,Hkv,G,S), denominators (1 where no key is visible) and lse (B,Hkv,G,1)."""
    if visible is not None:
        score = score.masked_fill(~visible, -torch.inf)
    largest = score.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest.isneginf(), 0)
    weight = (score - largest).exp()
    total = weight.sum(-1, keepdim=True)
    return weight, total.masked_fill(total == 0, 1), largest + total.log()


def force_materialize(x: Tensor) -> Tensor:
    """Return x so that Inductor writes it to memory instead of computing it again in the loop that reads it.

    `as_strided` needs an address, so it has that effect.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
