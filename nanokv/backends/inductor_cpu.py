"""A decode step's products, written so that Inductor makes one C++ loop of each: cast, multiply, add.

They are called only while compiling. Run as plain torch they would be slow and need much memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One thread that reads at one address waits for memory. On 2 cores of an Emerald Rapids the head's 57 MB were read at
# 15 GB/s from one address, and at 22, 27 and 29 GB/s from 2, 4 and 8 addresses at a time. On 2 cores of a Zen 4 steps of
# smollm2-135m took 10.9, 10.4, 10.7 and 11.4 ms with 2, 4, 6 and 8
N_PARALLEL_READS = 4
LONGEST_SUM = 4096  # Inductor adds up more numbers with an object in memory, which takes far longer
N_PIECES = 8  # a sum over tokens is made in so many pieces, in four times as many if they were longer than LONGEST_SUM
# Channels of the values that `mix` adds up side by side: in 16 bits a cache line. On 2 cores of a Zen 5 the values of 64
# or 128 channels a head were read from memory at 13 to 19 GB/s by tiles of half a line, at 20 to 48 by tiles of a line,
# and at 12 to 26 in one tile, whose sums are not kept in registers
TILE = 32
MOST_SUMS = 32  # of one loop over tokens; with more, tiles gained nothing


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row x (…,C) times weight (N,C), plus bias (N,) → (…,N) in the weight's type; products and sums are fp32."""
    lead, columns = x.shape[:-1], weight.shape[1]
    x, blocks = x.to(weight.dtype).float().view(-1), [rows.float() for rows in weight.chunk(N_PARALLEL_READS)]
    # a long row is a sum of equal stretches, so that one loop still reads it from its first column to its last
    n = next(n for n in range(1, columns + 1) if columns % n == 0 and columns // n <= LONGEST_SUM)
    if n > 1:
        x, blocks = x.view(n, -1), [rows.unflatten(1, (n, -1)) for rows in blocks]
    x = force_materialize(x)
    # the same loop reads all blocks of rows, and writes sums of one stretch where they belong, without a copy
    sums = [(x * rows).sum(-1) for rows in blocks]
    out = torch.cat(sums if n == 1 else [of_row.sum(-1) for of_row in sums])
    out = out if bias is None else out + bias.float()
    return out.to(weight.dtype).view(*lead, -1)


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
    """weight (…,n,S) times y (…,S,C) → (…,n,C): products of pieces of equal length, and of the tokens that are left."""
    weight, n_tokens = force_materialize(weight), y.shape[-2]
    if n_tokens < 2 * N_PIECES + 2:
        return _mix_piece(weight, y)
    n_pieces = N_PIECES if n_tokens <= N_PIECES * LONGEST_SUM else 4 * N_PIECES
    length = (n_tokens - 2) // n_pieces  # so at least two tokens are left: one would make a graph of its own
    end = length * n_pieces
    weights = weight[..., :end].unflatten(-1, (n_pieces, length)).transpose(-2, -3)  # (…,n_pieces,n,length)
    pieces = y[..., :end, :].unflatten(-2, (n_pieces, length))  # (…,n_pieces,length,C)
    few = (weight[..., end:, None] * y[..., None, end:, :]).sum(-2)  # without tiles: each costs a call for its memory
    return _mix_piece(weights, pieces).sum(-3) + few


def _mix_piece(weight: Tensor, y: Tensor) -> Tensor:
    """As `mix`, by one loop over y."""
    n, tiles = weight.shape[-2], (y,)
    if y.shape[-1] % TILE == 0 and n * y.shape[-1] // TILE <= MOST_SUMS:
        tiles = y.split(TILE, -1)
    sums = [(weight[..., i, :, None] * tile).sum(-2) for i in range(n) for tile in tiles]
    return torch.stack(sums, -2).unflatten(-2, (n, -1)).flatten(-2)


def force_materialize(x: Tensor) -> Tensor:
    """Return x so that Inductor writes it to memory instead of computing it again in the loop that reads it.

    `as_strided` needs an address, so it has that effect.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
