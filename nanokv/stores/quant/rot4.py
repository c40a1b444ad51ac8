"""Four bits after a rotation that spreads outliers over all channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.reference import pack, unpack
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context
from nanokv.stores.dense import Rounding
from nanokv.stores.quant.codec import HALF, Codec, hadamard, rotate


@dataclass(frozen=True, kw_only=True)
class Rot4(Rounding):
    """ExLlamaV2's 4-bit cache (no paper; its idea as QuaRot's, Ashkboos et al. 2024, arXiv:2404.00456, §4): a Hadamard
    rotation, then 4-bit codes −8 … 7 times a scale per `block` channels, the largest number of the block over 8.

    A rotation keeps products, so the query is turned once and the output turned back once; no cached key ever is. Deviations: one
    orthonormal rotation per head where theirs takes runs of 64 across heads in two interleaved halves; the scale is
    rounded up. As with theirs the code 8 does not exist: a block's positive extreme loses up to one scale, all else half of one.
    """

    block: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.block < 4:
            raise ValueError(f"rot4:block={self.block}; give 4 channels or more")

    def misfit(self, config: Any) -> str:
        return (
            ""
            if config.head_dim % 4 == 0
            else f"four codes share a word, and {config.head_dim} channels are no fours; use fp8"
        )

    def size(self, dim: int) -> int:
        """Of a block: the largest part that divides a head."""
        return math.gcd(self.block, dim)

    def widths(self, dim: int) -> tuple[float, float]:
        one = dim / 2 + 2 * dim // self.size(dim)
        return one, one

    def shared(self, config: Any) -> int:
        return 4 * (config.head_dim & -config.head_dim) ** 2

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        dim = ctx.config.head_dim
        codec = Rot4Codec(dim, self.size(dim), ctx.once("hadamard", lambda: hadamard(dim)))
        return codec, codec


class Rot4Codec(Codec):
    def __init__(self, dim: int, block: int, h: Tensor):
        self.block, self.h, self.planes = block, h, [(dim // 4, torch.int16), (dim // block, torch.float16)]

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        blocks = rotate(x.float(), self.h).unflatten(-1, (-1, self.block))
        scale = (blocks.abs().amax(-1) / 8 * (1 + 2**-10) + 2**-24).clamp(max=HALF).half()  # never below, never 0
        code = (blocks / scale.float()[..., None]).round().clamp(-8, 7) + 8
        return pack(code.to(torch.uint8).flatten(-2), 4), scale

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        code = unpack(planes[0], 4).to(dtype).unflatten(-1, (-1, self.block)) - 8
        return (code * planes[1].to(dtype)[..., None]).flatten(-2)

    def turn(self, x: Tensor) -> Tensor:
        return rotate(x, self.h)

    back = turn

    def tensors(self) -> list[Tensor]:
        return [self.h]
