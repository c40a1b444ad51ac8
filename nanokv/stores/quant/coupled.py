"""One to four bits per number: neighbouring channels share a code, which names the nearest of 256 centroids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.stores.quant.codec import HALF_MAX, Codec
from nanokv.stores.quant.fitted import Fitted, k_means, nearest, rotated_keys, unrotated_keys

CENTROIDS = 256  # a code is one byte
DISTANCE_BLOCK = 256  # tokens whose distances to all centroids exist at once


@dataclass(frozen=True, kw_only=True)
class Coupled(Fitted):
    """Coupled Quantization (Zhang et al. 2024, arXiv:2405.03917, §3): neighbouring channels of a head depend on each other,
    so `channels` of them are rounded together to the nearest of 256 centroids, K before its rotation. 2, 4 and 8 channels
    are 4, 2 and 1 bits per number (the paper's CQ-2c8b, CQ-4c8b and CQ-8c8b).

    Deviation: centroids are fitted by k-means to the prompt when it is packed, where the authors fit them to other texts,
    weighted by the loss's gradients. They take 512 bytes per channel of K and of V, so short prompts save nothing.

    channels  neighbours that share a code: 2, 4 or 8
    """

    channels: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.channels not in (2, 4, 8):
            raise ValueError(f"coupled:channels={self.channels}; give 2, 4 or 8")

    def incompatible_model(self, config: Any) -> str:
        if config.head_dim % self.channels == 0:
            return ""
        return f"channels={self.channels} does not divide this model's head dimension {config.head_dim}; use fp8"

    def widths(self, dim: int) -> tuple[float, float]:
        return dim // self.channels, dim // self.channels

    def table_shapes(self, dim: int) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        return (CENTROIDS * dim, torch.float16), (CENTROIDS * dim, torch.float16)

    def codec_types(self, ctx: Context) -> tuple[Any, Any]:
        return partial(CoupledCodec, self.channels, ctx, True), partial(CoupledCodec, self.channels, ctx, False)

    def fit(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        groups = (x.unflatten(1, (-1, self.channels)).transpose(0, 1) for x in (k, v))  # (D/c,n,c)
        return tuple(k_means(x, CENTROIDS).clamp(-HALF_MAX, HALF_MAX).half().flatten() for x in groups)


class CoupledCodec(Codec):
    """rotates: the vectors are keys, which are rounded as they were before their rotation."""

    rounds = makes_tensors = True

    def __init__(self, channels: int, ctx: Context, rotates: bool, table: Tensor):
        self.ctx, self.rotates, self.table = ctx, rotates, table
        self.groups = ctx.config.head_dim // channels
        self.centroids = table.view(*table.shape[:2], self.groups, CENTROIDS, channels)
        self.plane_types = [(self.groups, torch.uint8)]

    def of_row(self, b: int) -> Codec:
        return CoupledCodec(self.centroids.shape[-1], self.ctx, self.rotates, self.table[b : b + 1])

    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        x = unrotated_keys(x, pos, self.ctx.inv_freq) if self.rotates else x.float()
        groups = x.unflatten(-1, (self.groups, -1)).transpose(2, 3)  # (B,Hkv,D/c,T,c)
        some = (nearest(part, self.centroids.float()) for part in groups.split(DISTANCE_BLOCK, 3))
        return (torch.cat(list(some), 3).transpose(2, 3).to(torch.uint8),)

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        code = planes[0].to(torch.int32)  # (B,Hkv,T,D/c)
        first = torch.arange(self.centroids[..., 0, 0].numel(), dtype=torch.int32, device=code.device) * CENTROIDS
        index = code + first.view(*self.centroids.shape[:2], 1, self.groups)
        x = self.centroids.flatten(0, 3).index_select(0, index.flatten()).view(*code.shape[:3], -1)
        return (rotated_keys(x, pos, self.ctx.inv_freq) if self.rotates else x).to(dtype)
