"""Four bits after a rotation that spreads outliers over all channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import pack, unpack
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import StoreSpec
from nanokv.stores.dense import PerToken
from nanokv.stores.quant.codec import HALF_MAX, Codec, HadamardCodec, hadamard, hadamard_rotate


@dataclass(frozen=True, kw_only=True)
class Rot4(PerToken):
    """ExLlamaV2's 4-bit cache (no paper; the idea is QuaRot's, Ashkboos et al. 2024, arXiv:2404.00456, §4): a
    Hadamard rotation, then 4-bit codes −8 … 7 times a scale per `block` channels, which is the block's largest number
    over 8.

    A rotation keeps products, so the query is rotated once and the output rotated back once; no cached key ever is.
    Deviations: one orthonormal rotation per head, where theirs takes runs of 64 channels across heads in two
    interleaved halves; the scale is rounded up. As in theirs the code 8 does not exist: a block's largest positive
    number loses up to one scale, every other number half of one.

    block  channels that share a scale
    """

    block: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.block < 4:
            raise ValueError(f"rot4:block={self.block}; give 4 channels or more")

    def incompatible_model(self, config: Any) -> str:
        if config.head_dim % 4 == 0:
            return ""
        return f"four codes share a word, and 4 does not divide this model's head dimension {config.head_dim}; use fp8"

    def block_size(self, dim: int) -> int:
        """Channels of a block: the largest part of `block` that divides a head."""
        return math.gcd(self.block, dim)

    def widths(self, dim: int) -> tuple[float, float]:
        one = dim / 2 + 2 * dim // self.block_size(dim)
        return one, one

    def constant_bytes(self, config: Any) -> int:
        return 4 * (config.head_dim & -config.head_dim) ** 2

    def behind_prefix(self, n: int) -> StoreSpec | None:
        return replace(self, pin=0) if self.pin <= n else None

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        dim = ctx.config.head_dim
        codec = Rot4Codec(dim, self.block_size(dim), ctx.shared_constant("hadamard", lambda: hadamard(dim)))
        return codec, codec


class Rot4Codec(HadamardCodec):
    def __init__(self, dim: int, block: int, h: Tensor):
        super().__init__(h, [(dim // 4, torch.int16), (dim // block, torch.float16)])
        self.block = block

    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        blocks = hadamard_rotate(x.float(), self.h).unflatten(-1, (-1, self.block))
        # rounded up, so never below the exact scale and never 0
        scale = (blocks.abs().amax(-1) / 8 * (1 + 2**-10) + 2**-24).clamp(max=HALF_MAX).half()
        code = (blocks / scale.float()[..., None]).round().clamp(-8, 7) + 8
        return pack(code.to(torch.uint8).flatten(-2), 4), scale

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        code = unpack(planes[0], 4).to(dtype).unflatten(-1, (-1, self.block)) - 8
        return (code * planes[1].to(dtype)[..., None]).flatten(-2)
