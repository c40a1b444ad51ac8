"""How one token's key or value is written: as it is, or as codes. Every store that rounds token by token is made of
codecs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, StoreState

HALF_MAX = torch.finfo(torch.float16).max  # scales are fp16, and infinity times code 0 is no number


class Codec:
    """Exact: one plane, the vector itself. A codec that rounds sets other `plane_types`, and overrides `encode` and `decode`.

    A plane is one of the tensors (B,Hkv,T,width) that together hold the vectors (B,Hkv,T,D).
    """

    rounds = False
    makes_tensors = False  # True if `decode` makes new tensors, so that a store reads in blocks
    scale: Tensor | None = None  # (B,Hkv,1,1), of a codec that measures each head once
    table: Tensor | None = None  # (B,Hkv,W), of a codec that fits W numbers to each head's prompt

    def __init__(self, dim: int, dtype: torch.dtype):
        self.plane_types = [(dim, dtype)]  # width and type of each plane

    def of_row(self, b: int) -> Codec:
        """The codec of one row of the batch."""
        return self

    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        """x (B,Hkv,T,D) of tokens at pos (B,·,T) → its planes."""
        return (x,)

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        """Planes → (B,Hkv,T,D) in `dtype`; fp8 may return 8-bit numbers, for a kernel that reads them.

        A codec may leave out a rotation or a scale here, because it is cheaper to apply it once to the query
        (`query_for_codes`) and once to the output (`restore`) than to every key and value.
        """
        return planes[0]

    def query_for_codes(self, q: Tensor) -> Tensor:
        """The query whose products with what `decode` returned for keys are those of q (B,H,T,D) with the keys."""
        return q

    def restore(self, x: Tensor) -> Tensor:
        """What `decode` returned, or a weighted sum of it, as the model's vectors."""
        return x

    def tensors(self) -> list[Tensor]:
        """What the codec holds besides the planes, for the receipt."""
        return [x for x in (self.scale, self.table) if x is not None]

    def table_of(self, b: int) -> Tensor | None:
        """(1,Hkv,W): the table of one row."""
        return None if self.table is None else self.table[b : b + 1]

    @property
    def token_bytes(self) -> float:
        """Bytes per token and KV head."""
        return sum(n * dtype.itemsize for n, dtype in self.plane_types)


class HadamardCodec(Codec):
    """A codec that rounds after a rotation by `h`, as `hadamard` makes it."""

    rounds = makes_tensors = True

    def __init__(self, h: Tensor, plane_types: list[tuple[int, torch.dtype]]):
        self.h, self.plane_types = h, plane_types

    def query_for_codes(self, q: Tensor) -> Tensor:
        return hadamard_rotate(q, self.h)

    def restore(self, x: Tensor) -> Tensor:
        return hadamard_rotate(x, self.h)  # its own inverse

    def tensors(self) -> list[Tensor]:
        return [self.h]


@dataclass(frozen=True)
class CodeState(StoreState):
    """The codes of a row's tokens: of K and of V the planes (1,Hkv,N,·), the head's scale repeated per token
    (1,Hkv,N,1), and the head's table (1,Hkv,W).
    """

    codes: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    tables: tuple[Tensor | None, Tensor | None] = (None, None)

    def select(self, index: Tensor) -> CodeState:
        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))

        codes = tuple(tuple(map(pick, planes)) for planes in self.codes)
        return CodeState(codes, tuple(map(pick, self.scales)), self.tables)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{name}s": x for name, x in zip("kv", self.scales, strict=True) if x is not None}
        found |= {f"{name}t": x for name, x in zip("kv", self.tables, strict=True) if x is not None}
        for name, planes in zip("kv", self.codes, strict=True):
            found |= {f"{name}{i}": plane for i, plane in enumerate(planes)}
        return found

    def check(self, row: Kept, spec: Any, ctx: Context) -> None:
        shape = row.pos.shape
        scales = [x for x in self.scales if x is not None]
        if any(x is not None and (x.dim() != 3 or x.shape[:2] != shape[:2]) for x in self.tables):
            raise ValueError("its tables are of other heads")
        if any(x.dim() != 4 or x.shape[:3] != shape for planes in (*self.codes, scales) for x in planes):
            raise ValueError("the codes are of other tokens")
        if not all(x.dtype in (torch.float32, torch.float64) and x.shape[3] == 1 and (x > 0).all() for x in scales):
            raise ValueError("a scale is no positive number")
        if scales and len(scales) < 2:
            raise ValueError("the scales of K or of V are missing")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CodeState:
        codes = tuple(
            tuple(tensors[f"{name}{i}"] for i in range(sum(key[0] == name and key[1:].isdigit() for key in tensors)))
            for name in "kv"
        )
        return cls(codes, (tensors.get("ks"), tensors.get("vs")), (tensors.get("kt"), tensors.get("vt")))


def check_places(at: Tensor, size: int) -> None:
    """ValueError unless all these indices are below `size`. A file may say anything."""
    if at.numel() and int(at.max()) >= size:
        raise ValueError(f"an outlier stands at {int(at.max())} of {size} places")


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes] for uint8 codes. On the CPU five times as fast as indexing, and as torch's own conversion of fp8."""
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def hadamard(dim: int) -> Tensor:
    """(n,n) fp32, symmetric and orthonormal, for runs of n channels; n is the largest power of two that divides dim."""
    h = torch.ones(1, 1)
    while h.shape[0] < dim & -dim:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / h.shape[0] ** 0.5


def hadamard_rotate(x: Tensor, h: Tensor) -> Tensor:
    """Multiply each run of channels by h. It is its own inverse."""
    return (x.float().unflatten(-1, (-1, h.shape[0])) @ h).flatten(-2).to(x.dtype)
