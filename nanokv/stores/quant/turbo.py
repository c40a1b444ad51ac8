"""Two to four bits: a random rotation makes every vector look Gaussian, for which the best levels are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.reference import pack, unpack
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context
from nanokv.stores.dense import Rounding
from nanokv.stores.quant.codec import HALF, Codec, hadamard, look_up, rotate

# of a normal number, those that lose least of its square (Lloyd, Max); the negative half mirrors these
LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


@dataclass(frozen=True, kw_only=True)
class Turbo(Rounding):
    """TurboQuant, the form that minimises the mean squared error (Zandieh et al. 2025, arXiv:2504.19874, §3.1): signs drawn once, a
    Hadamard rotation, then each number of the unit vector to the nearest Lloyd-Max level; the length goes with the codes.

    Deviations: no extra bit for unbiased products (§3.2), which others found to do harm; the length stored is that which
    the levels need to come out as long as the vector was.
    """

    k: int = 4
    v: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.k not in LEVELS or self.v not in LEVELS:
            raise ValueError(f"turbo:k={self.k},v={self.v}; bits are 2, 3 or 4")

    def misfit(self, config: Any) -> str:
        return (
            ""
            if config.head_dim % 8 == 0
            else f"8 does not divide this model's head dimension {config.head_dim}; use fp8"
        )

    def widths(self, dim: int) -> tuple[float, float]:
        return dim * self.k / 8 + 2, dim * self.v / 8 + 2

    def shared(self, config: Any) -> int:
        dim = config.head_dim
        return 4 * ((dim & -dim) ** 2 + dim + sum(2 * 2**b for b in {self.k, self.v}))

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        return TurboCodec(self.k, ctx), TurboCodec(self.v, ctx)


class TurboCodec(Codec):
    def __init__(self, bits: int, ctx: Context):
        dim = ctx.config.head_dim
        self.bits, self.planes = (
            bits,
            [(dim * bits // 8 // (2 if bits == 4 else 1), torch.int16 if bits == 4 else torch.uint8)],
        )
        self.planes.append((1, torch.float16))
        half = torch.tensor(LEVELS[bits])
        self.levels = ctx.once(f"levels{bits}", lambda: torch.cat((-half.flip(0), half)) / dim**0.5)
        self.between = ctx.once(f"between{bits}", lambda: (self.levels[1:] + self.levels[:-1]) / 2)
        self.h = ctx.once("hadamard", lambda: hadamard(dim))
        draw = torch.Generator().manual_seed(0)
        self.sign = ctx.once("sign", lambda: torch.randint(0, 2, (dim,), generator=draw) * 2.0 - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.turn(x.float())
        length = y.norm(dim=-1, keepdim=True)
        code = torch.bucketize(y / length.clamp(min=1e-30), self.between).to(torch.uint8)
        own = look_up(self.levels, code).norm(dim=-1, keepdim=True)
        return pack(code, self.bits), (length / own).clamp(max=HALF).half()

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return look_up(self.levels.to(dtype), unpack(planes[0], self.bits)) * planes[1].to(dtype)

    def turn(self, x: Tensor) -> Tensor:
        return rotate(x * self.sign.to(x.dtype), self.h)

    def back(self, x: Tensor) -> Tensor:
        return rotate(x, self.h) * self.sign.to(x.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.h, self.sign, self.levels, self.between]
