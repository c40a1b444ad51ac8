"""How a token's key or value is written down alone: as it is, or as codes. What every store that rounds token by token is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = torch.finfo(torch.float16).max  # scales are fp16, and infinity times no code is no number


class Codec:
    """Exact: one plane, the vector itself. A codec that rounds replaces all of it.

    A plane is one of the tensors (B,Hkv,T,width) that together hold the vectors (B,Hkv,T,D).
    """

    scale: Tensor | None = None  # (B,Hkv,1,1), of a codec that measures each head once

    def __init__(self, dim: int, dtype: torch.dtype):
        self.planes = [(dim, dtype)]

    def of_row(self, b: int) -> Codec:
        """For one row of the batch."""
        return self

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(B,Hkv,T,D) in `dtype`, in the space that `turn` leads to."""
        return planes[0]

    def turn(self, x: Tensor) -> Tensor:
        """A vector into the codec's own space; it keeps products, so a query is turned once instead of every key."""
        return x

    def back(self, x: Tensor) -> Tensor:
        """… and out of it."""
        return x

    def tensors(self) -> list[Tensor]:
        """What it needs besides the planes, for the receipt."""
        return [] if self.scale is None else [self.scale]

    @property
    def width(self) -> float:
        """Bytes per token."""
        return sum(n * dtype.itemsize for n, dtype in self.planes)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """What each code (uint8) stands for. On the CPU five times as fast as indexing, and as torch's own conversion of fp8."""
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def hadamard(dim: int) -> Tensor:
    """(n,n) fp32, symmetric and orthonormal, for runs of n channels: the largest power of two that divides dim."""
    h = torch.ones(1, 1)
    while h.shape[0] < dim & -dim:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / h.shape[0] ** 0.5


def rotate(x: Tensor, h: Tensor) -> Tensor:
    """Runs of channels times h; its own inverse."""
    return (x.float().unflatten(-1, (-1, h.shape[0])) @ h).flatten(-2).to(x.dtype)
