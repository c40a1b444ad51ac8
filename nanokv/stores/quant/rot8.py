"""Eight bits after a rotation that spreads outliers over all channels, with one scale a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import StoreSpec
from nanokv.stores.dense import PerToken
from nanokv.stores.quant.codec import HALF_MAX, Codec, HadamardCodec, hadamard, hadamard_rotate


@dataclass(frozen=True, kw_only=True)
class Rot8(PerToken):
    """llama.cpp's q8_0 cache behind a Hadamard rotation, as it has it since April 2026 (no paper; the idea is QuaRot's,
    Ashkboos et al. 2024, arXiv:2404.00456, §4): codes −127 … 127 times a scale, which is the vector's largest number
    over 127.

    The query is rotated once and the output rotated back once; no cached key ever is. Deviations: one scale for the
    vector of a head, where q8_0 has one per 32 channels; the rotation is of a whole head.
    """

    def widths(self, dim: int) -> tuple[float, float]:
        return dim + 2, dim + 2

    def constant_bytes(self, config: Any) -> int:
        return 4 * (config.head_dim & -config.head_dim) ** 2

    def behind_prefix(self, n: int) -> StoreSpec | None:
        return replace(self, pin=0) if self.pin <= n else None

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        dim = ctx.config.head_dim
        planes = [(dim, torch.int8), (1, torch.float16)]
        codec = Rot8Codec(ctx.shared_constant("hadamard", lambda: hadamard(dim)), planes)
        return codec, codec


class Rot8Codec(HadamardCodec):
    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        y = hadamard_rotate(x.float(), self.h)
        # rounded up, so never below the exact scale and never 0
        scale = (y.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-10) + 2**-24).clamp(max=HALF_MAX).half()
        return (y / scale.float()).round().clamp(-127, 127).to(torch.int8), scale

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        return planes[0].to(dtype) * planes[1].to(dtype)
