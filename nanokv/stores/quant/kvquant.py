"""Two to four bits with levels where the numbers are: K per channel before its rotation, V per token, outliers exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import pack, unpack
from nanokv.cache.context import Context
from nanokv.stores.quant.codec import HALF_MAX, Codec, check_places
from nanokv.stores.quant.fitted import Fitted, k_means, rotated_keys, unrotated_keys

TAIL = 0.005  # share of a channel's numbers at either end that its range leaves out
ENCODE_BLOCK = 512  # tokens encoded together, to bound the memory
LEVEL_NUMBERS = 4096  # that the levels of a head are fitted to


@dataclass(frozen=True, kw_only=True)
class KVQuant(Fitted):
    """KVQuant (Hooper et al. 2024, arXiv:2401.18079, §3). A channel of K before rotation has its own range, and so has each
    token's V; within its range, −1 to 1, a number becomes the nearest of 2^bits levels that k-means has found. The
    numbers of each token that lie furthest out stay exact, and so does the first token.

    Deviations: ranges of channels and levels are fitted to the prompt when it is packed, and levels to each head, where the
    authors fit them to other texts, weighted by the loss's gradients, and to each layer; each token has the same number
    of exact numbers, for K too; no normalisation of the levels for 2 bits. Keys are rotated at each step, which takes
    time.

    k         bits of K: 2, 3 or 4
    v         bits of V
    outliers  numbers of each token's K and V that stay exact (fp16), per head
    """

    k: int = 4
    v: int = 4
    outliers: int = 1
    pin: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.k not in (2, 3, 4) or self.v not in (2, 3, 4) or not 1 <= self.outliers <= 8:
            raise ValueError(
                f"kvquant:k={self.k},v={self.v},outliers={self.outliers}; bits are 2, 3 or 4 and outliers 1 to 8"
            )

    def incompatible_model(self, config: Any) -> str:
        if config.head_dim % 8 == 0 and self.outliers < config.head_dim <= 256:
            return ""
        return f"a head needs 8, 16, … or 256 channels and more than outliers={self.outliers}, not {config.head_dim}; use fp8"

    def widths(self, dim: int) -> tuple[float, float]:
        return dim * self.k / 8 + 3 * self.outliers, dim * self.v / 8 + 3 * self.outliers + 4

    def table_shapes(self, dim: int) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        return (2 * dim + 2**self.k, torch.float32), (2**self.v, torch.float32)

    def check_codes(self, codes: Sequence[Sequence[Tensor]], dim: int) -> None:
        for _, _, at in codes:
            check_places(at, dim)

    def codec_types(self, ctx: Context) -> tuple[Any, Any]:
        return partial(KeyCodec, self.k, self.outliers, ctx), partial(ValueCodec, self.v, self.outliers, ctx)

    def fit(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ordered, cut = k.sort(0).values, round(TAIL * (len(k) - 1))
        low, high = ordered[cut], ordered[len(k) - 1 - cut]
        center, half = (low + high) / 2, (high - low) / 2
        half = torch.where(half > 1e-5, half, 1.0)  # the range of a channel that is the same everywhere
        of_k = _levels((k - center) / half, self.k)
        at = _furthest(v - v.mean(-1, keepdim=True), self.outliers)
        of_v = _levels(_in_range(v, at)[0].scatter(-1, at, 2.0), self.v)
        return torch.cat((center, half, of_k)), of_v


class NonUniformCodec(Codec, ABC):
    """Levels (B,Hkv,2^bits), and of each token some numbers that are exact."""

    rounds = makes_tensors = True

    def __init__(self, bits: int, outliers: int, ctx: Context, table: Tensor):
        dim = ctx.config.head_dim
        self.bits, self.outliers, self.ctx, self.table = bits, outliers, ctx, table
        self.levels = table[..., -(2**bits) :]
        words = (dim // 4, torch.int16) if bits == 4 else (dim * bits // 8, torch.uint8)
        self.plane_types = [words, (outliers, torch.float16), (outliers, torch.uint8)]

    def of_row(self, b: int) -> Codec:
        return type(self)(self.bits, self.outliers, self.ctx, self.table[b : b + 1])

    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        if x.shape[2] <= ENCODE_BLOCK:
            return self.encode_some(x, pos)
        parts = zip(x.split(ENCODE_BLOCK, 2), pos.split(ENCODE_BLOCK, 2), strict=True)
        return tuple(torch.cat(plane, 2) for plane in zip(*(self.encode_some(*part) for part in parts), strict=True))

    @abstractmethod
    def encode_some(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        """`encode` for at most ENCODE_BLOCK tokens."""

    def _codes(self, y: Tensor) -> Tensor:
        """y (B,Hkv,T,D) → packed codes of the nearest levels."""
        between = (self.levels[..., 1:] + self.levels[..., :-1]) / 2
        code = torch.searchsorted(between, y.flatten(2).contiguous()).view(y.shape)
        return pack(code.to(torch.uint8), self.bits)

    def _numbers(self, words: Tensor) -> Tensor:
        """Packed codes → their levels, fp32."""
        code = unpack(words, self.bits)
        first = torch.arange(self.levels[..., 0].numel(), dtype=torch.int32, device=code.device) * 2**self.bits
        index = code.to(torch.int32) + first.view(*self.levels.shape[:2], 1, 1)
        return self.levels.flatten().index_select(0, index.flatten()).view(code.shape)


class KeyCodec(NonUniformCodec):
    """The table holds the center and half the width of each channel's range, and the levels. The planes are codes, exact
    numbers and their channels.
    """

    def encode_some(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        x = unrotated_keys(x, pos, self.ctx.inv_freq)
        center, half = self._range()
        y = (x - center) / half
        at = _furthest(y, self.outliers)
        return self._codes(y), _half(x.gather(-1, at)), at.to(torch.uint8)

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        center, half = self._range()
        words, exact, at = planes
        x = (self._numbers(words) * half + center).scatter(-1, at.long(), exact.float())
        return rotated_keys(x, pos, self.ctx.inv_freq).to(dtype)

    def _range(self) -> tuple[Tensor, Tensor]:
        """(B,Hkv,1,D) each."""
        dim = self.ctx.config.head_dim
        return self.table[..., None, :dim], self.table[..., None, dim : 2 * dim]


class ValueCodec(NonUniformCodec):
    """The table holds the levels. The planes are codes; center and half the width of the token's range, and its exact
    numbers; their channels.
    """

    def __init__(self, bits: int, outliers: int, ctx: Context, table: Tensor):
        super().__init__(bits, outliers, ctx, table)
        self.plane_types[1] = (2 + outliers, torch.float16)

    def encode_some(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        at = _furthest(x - x.mean(-1, keepdim=True), self.outliers)
        y, both = _in_range(x, at)
        return self._codes(y), torch.cat((both, _half(x.gather(-1, at))), -1), at.to(torch.uint8)

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        words, numbers, at = planes
        center, half, exact = numbers.float().split((1, 1, self.outliers), -1)
        return (self._numbers(words) * half + center).scatter(-1, at.long(), exact).to(dtype)


def _furthest(x: Tensor, n: int) -> Tensor:
    """(…,n) int64: the channels of the n numbers that are furthest from zero. Numbers that differ in the last bits count as
    equal, and the first of them wins: the two ends of a channel's range, −1 and 1, are equally far.
    """
    size = x.abs()
    size = (2**16 * size / size.amax(-1, keepdim=True).clamp(min=1e-6)).round()
    return size.argsort(dim=-1, descending=True, stable=True)[..., :n]


def _half(x: Tensor) -> Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half()


def _in_range(x: Tensor, outliers: Tensor) -> tuple[Tensor, Tensor]:
    """x (…,T,D) → each token divided by the range of its numbers that are no outliers, and center and half of that
    range (…,T,2) fp16.
    """
    low, high = (x.scatter(-1, outliers, sign * torch.inf) for sign in (1, -1))
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    center = _half((low + high) / 2)
    reach = torch.maximum(high - center.float(), center.float() - low)  # the center was rounded
    half = _half(torch.where(reach > 1e-5, reach * (1 + 2**-10), 1.0))  # never below the reach
    return (x - center.float()) / half.float(), torch.cat((center, half), -1)


def _levels(y: Tensor, bits: int) -> Tensor:
    """(2^bits,) ascending, fitted to those of y that are within −1 … 1."""
    y = (2**16 * y).round() / 2**16  # or noise would tell apart the ends of the channels' ranges
    ordered = y[y.abs() < 1.01].sort().values
    if not len(ordered):  # nothing here is a number
        return torch.linspace(-1, 1, 2**bits, dtype=y.dtype, device=y.device)
    some = torch.linspace(0, len(ordered) - 1, min(len(ordered), LEVEL_NUMBERS), device=y.device).round().long()
    return k_means(ordered[some, None], 2**bits)[:, 0].sort().values  # few numbers may leave them out of order
