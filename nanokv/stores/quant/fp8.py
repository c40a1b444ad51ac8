"""Eight-bit floating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context
from nanokv.stores.dense import Rounding
from nanokv.stores.quant.codec import Codec, look_up

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Fp8(Rounding):
    """FP8 (Micikevicius et al. 2022, arXiv:2209.05433, §3): each number to the nearest of e4m3 (three bits of mantissa, up to 448) or
    e5m2 (two bits, up to 57344), times a scale per KV head that the largest number of the first tokens sets once.

    Deviations from what serving engines do: the scale is a power of two, so that scaling itself rounds nothing; what comes
    later and is larger than the format goes to its largest number.
    """

    format: str = "e4m3"  # e4m3 | e5m2

    def __post_init__(self):
        super().__post_init__()
        if self.format not in FORMATS:
            raise ValueError(f"fp8:format={self.format}; format is {' or '.join(FORMATS)}")

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        token, fixed = super().cost(config, dtype, sink)
        return token, fixed + 2 * 4 * config.num_key_value_heads  # the scales

    def widths(self, dim: int) -> tuple[float, float]:
        return dim, dim

    def shared(self, config: Any) -> int:
        return 4 * 256

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        kind = FORMATS[self.format]
        numbers = ctx.once(self.format, lambda: torch.arange(256, dtype=torch.uint8).view(kind).float())
        raw = ctx.ops.reads(kind)
        return tuple(Fp8Codec(self.scale(rows, name), kind, numbers, ctx.config.head_dim, raw) for name in "kv")

    def scale(self, rows: Sequence[Kept], name: str) -> Tensor:
        """(B,Hkv,1,1) fp32: the least power of two that brings each head's numbers into the format."""
        if rows[0].codes is not None:
            known = [torch.nn.functional.pad(r.codes[f"{name}s"], (0, 0, 0, 1), value=1.0) for r in rows]  # … or empty
            return torch.cat([x[:, :, :1] for x in known])
        whole = [torch.nn.functional.pad(getattr(r, name), (0, 0, 0, 1)) for r in rows]  # a row may be empty
        most = torch.cat([x.float().abs().amax((2, 3), keepdim=True) for x in whole])
        least = most / torch.finfo(FORMATS[self.format]).max
        return torch.where(least > 0, least.log2().ceil().clamp(-60, 60).exp2(), 1.0)


class Fp8Codec(Codec):
    """raw: whether the backend reads such numbers itself; the scale then meets the query and the result instead of every key and value."""

    def __init__(self, scale: Tensor, kind: torch.dtype, numbers: Tensor, dim: int, raw: bool):
        self.scale, self.kind, self.numbers, self.planes, self.raw = scale, kind, numbers, [(dim, torch.uint8)], raw

    def of_row(self, b: int) -> Fp8Codec:
        return Fp8Codec(self.scale[b : b + 1], self.kind, self.numbers, self.planes[0][0], self.raw)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        most = torch.finfo(self.kind).max
        return ((x.float() / self.scale).clamp(-most, most).to(self.kind).view(torch.uint8),)

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if self.raw:
            return planes[0].view(self.kind)
        return look_up(self.numbers.to(dtype), planes[0]) * self.scale.to(dtype)

    def turn(self, x: Tensor) -> Tensor:
        if not self.raw:
            return x
        scale = self.scale.repeat_interleave(x.shape[1] // self.scale.shape[1], 1)
        return (x.float() * scale).to(x.dtype if x.itemsize > 1 else torch.float32)

    def back(self, x: Tensor) -> Tensor:
        return self.turn(x)

    def tensors(self) -> list[Tensor]:
        return [self.scale, self.numbers]
