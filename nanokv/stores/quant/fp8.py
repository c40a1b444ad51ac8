"""Eight-bit floating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.stores.dense import PerToken
from nanokv.stores.quant.codec import Codec, look_up

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# Later numbers may be this many times as large as the first tokens'. On smollm2-135m they reach 36 times those of the
# first token. A floating-point format loses no precision by it, only range at the small end
HEADROOM = 64


@dataclass(frozen=True, kw_only=True)
class Fp8(PerToken):
    """FP8 (Micikevicius et al. 2022, arXiv:2209.05433, §3): each number becomes the nearest one of e4m3 (three bits
    of mantissa, up to 448) or e5m2 (two bits, up to 57344), times a scale per KV head that the largest number of the
    first tokens sets once.

    Deviations from what serving engines do: the scale is a power of two, so scaling itself rounds nothing; it leaves
    room for numbers 64 times as large, because a short prompt says little about what follows. A later number that is
    still too large becomes the format's largest.

    format  e4m3 or e5m2
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

    def constant_bytes(self, config: Any) -> int:
        return 4 * 256

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        kind, dim = FORMATS[self.format], ctx.config.head_dim
        numbers = ctx.shared_constant(self.format, lambda: torch.arange(256, dtype=torch.uint8).view(kind).float())
        fused = ctx.ops.decodes_fp8(kind)
        return tuple(Fp8Codec(self.scale(rows, i), kind, numbers, dim, fused) for i in range(2))

    def scale(self, rows: Sequence[Kept], i: int) -> Tensor:
        """(B,Hkv,1,1) fp32, of K (i = 0) or V (1): the least power of two that brings numbers HEADROOM times as large as
        each head's into the format.
        """
        if rows[0].state is not None:
            known = [pad(r.state.scales[i], (0, 0, 0, 1), value=1.0) for r in rows]  # a row may be empty
            return torch.cat([x[:, :, :1] for x in known])
        padded = [pad((r.k, r.v)[i], (0, 0, 0, 1)) for r in rows]
        largest = torch.cat([x.float().abs().amax((2, 3), keepdim=True) for x in padded])
        needed = HEADROOM * largest / torch.finfo(FORMATS[self.format]).max
        return torch.where(needed > 0, needed.log2().ceil().clamp(-60, 60).exp2(), 1.0)


class Fp8Codec(Codec):
    """fused: the backend's `decode` takes 8-bit numbers. The scale then multiplies the query and the output instead
    of keys and values.
    """

    rounds = True

    def __init__(self, scale: Tensor, kind: torch.dtype, numbers: Tensor, dim: int, fused: bool):
        self.scale, self.kind, self.numbers, self.fused, self.makes_tensors = scale, kind, numbers, fused, not fused
        self.plane_types = [(dim, torch.uint8)]

    def of_row(self, b: int) -> Fp8Codec:
        return Fp8Codec(self.scale[b : b + 1], self.kind, self.numbers, self.plane_types[0][0], self.fused)

    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        largest = torch.finfo(self.kind).max
        return ((x / self.scale).clamp(-largest, largest).to(self.kind).view(torch.uint8),)  # scale makes it fp32

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        if self.fused:
            return planes[0].view(self.kind)
        return look_up(self.numbers.to(dtype), planes[0]) * self.scale.to(dtype)

    def query_for_codes(self, q: Tensor) -> Tensor:
        return self._scaled(q)

    def restore(self, x: Tensor) -> Tensor:
        return self._scaled(x)

    def _scaled(self, x: Tensor) -> Tensor:
        """x (B,H,T,D) times the scale that `decode` leaves out if `fused`."""
        if not self.fused:
            return x
        x = x if x.itemsize > 1 else x.float()  # torch multiplies no 8-bit numbers
        out, heads = torch.empty_like(x, memory_format=torch.contiguous_format), (self.scale.shape[1], -1)
        torch.mul(x.unflatten(1, heads), self.scale[:, :, None], out=out.unflatten(1, heads))
        return out

    def tensors(self) -> list[Tensor]:
        return [self.scale, self.numbers]
