"""Two to four bits: a random rotation makes every vector look Gaussian, and for Gaussian numbers the best levels are
known.
"""

from __future__ import annotations

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
from nanokv.stores.quant.codec import HALF_MAX, Codec, hadamard, hadamard_rotate, look_up

# The Lloyd-Max levels of a standard normal number, which minimise the mean squared error; the negative half mirrors
# these
LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


@dataclass(frozen=True, kw_only=True)
class Turbo(PerToken):
    """TurboQuant in the form that minimises the mean squared error (Zandieh et al. 2025, arXiv:2504.19874, §3.1):
    signs drawn once and a Hadamard rotation, then each number of the unit vector becomes the nearest Lloyd-Max level;
    the vector's length is stored beside them.

    Deviations: no extra bit for unbiased products (§3.2), which others found to do harm; the stored length is the one
    that makes the levels as long as the vector was.

    k  bits of K: 2, 3 or 4
    v  bits of V
    """

    k: int = 4
    v: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.k not in LEVELS or self.v not in LEVELS:
            raise ValueError(f"turbo:k={self.k},v={self.v}; bits are 2, 3 or 4")

    def incompatible_model(self, config: Any) -> str:
        if config.head_dim % 8 == 0:
            return ""
        return f"8 does not divide this model's head dimension {config.head_dim}; use fp8"

    def widths(self, dim: int) -> tuple[float, float]:
        return dim * self.k / 8 + 2, dim * self.v / 8 + 2

    def constant_bytes(self, config: Any) -> int:
        dim = config.head_dim
        return 4 * ((dim & -dim) ** 2 + dim + sum(2 * 2**b for b in {self.k, self.v}))

    def behind_prefix(self, n: int) -> StoreSpec | None:
        return replace(self, pin=0) if self.pin <= n else None

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        return TurboCodec(self.k, ctx), TurboCodec(self.v, ctx)


class TurboCodec(Codec):
    rounds = makes_tensors = True

    def __init__(self, bits: int, ctx: Context):
        dim, constant = ctx.config.head_dim, ctx.shared_constant
        words = (dim // 4, torch.int16) if bits == 4 else (dim * bits // 8, torch.uint8)
        self.bits, self.plane_types = bits, [words, (1, torch.float16)]
        half = torch.tensor(LEVELS[bits])
        self.levels = constant(f"levels{bits}", lambda: torch.cat((-half.flip(0), half)) / dim**0.5)
        self.boundaries = constant(f"between{bits}", lambda: (self.levels[1:] + self.levels[:-1]) / 2)
        self.h = constant("hadamard", lambda: hadamard(dim))
        generator = torch.Generator().manual_seed(0)
        self.sign = constant("sign", lambda: torch.randint(0, 2, (dim,), generator=generator) * 2.0 - 1)

    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        y = hadamard_rotate(x.float() * self.sign, self.h)
        length = y.norm(dim=-1, keepdim=True)
        code = torch.bucketize(y / length.clamp(min=1e-30), self.boundaries).to(torch.uint8)
        length_of_levels = look_up(self.levels, code).norm(dim=-1, keepdim=True)
        return pack(code, self.bits), (length / length_of_levels).clamp(max=HALF_MAX).half()

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        return look_up(self.levels.to(dtype), unpack(planes[0], self.bits)) * planes[1].to(dtype)

    def query_for_codes(self, q: Tensor) -> Tensor:
        return hadamard_rotate(q * self.sign.to(q.dtype), self.h)

    def restore(self, x: Tensor) -> Tensor:
        return hadamard_rotate(x, self.h) * self.sign.to(x.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.h, self.sign, self.levels, self.boundaries]
