"""Formats whose codes refer to a table that is fitted to the prompt: one table per head, for K before its rotation and for V."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.model.rope import rotate_more
from nanokv.stores.dense import PerToken
from nanokv.stores.quant.codec import Codec, CodeState

FIT_TOKENS = 1024  # of a longer prompt, so many evenly spaced tokens are fitted to
ROUNDS = 5  # of k-means


class FittedState(CodeState):
    """Codes with their tables."""

    def check(self, row: Kept, spec: Any, ctx: Context) -> None:
        super().check(row, spec, ctx)
        for x, (width, kind) in zip(self.tables, spec.table_shapes(ctx.config.head_dim), strict=True):
            if x is None or x.shape[2] != width or x.dtype not in (kind, torch.float64) or not x.isfinite().all():
                raise ValueError("its tables are missing, of another store, or hold values that are no numbers")
        spec.check_codes(self.codes, ctx.config.head_dim)


@dataclass(frozen=True, kw_only=True)
class Fitted(PerToken):
    """The part that the formats share: they fit their tables to what stays of the prompt when it is packed, and never
    again, so later turns are rounded by the same tables.
    """

    state_type = FittedState

    @abstractmethod
    def fit(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One head's keys before rotation and its values, (n,D) fp32 each → the table of K and that of V, (W,) each."""

    @abstractmethod
    def codec_types(self, ctx: Context) -> tuple[Any, Any]:
        """For K and for V: what makes a codec of a table (B,Hkv,W)."""

    @abstractmethod
    def table_shapes(self, dim: int) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        """Width and type of one head's table of K, and of that of V."""

    def check_codes(self, codes: Sequence[Sequence[Tensor]], dim: int) -> None:
        """ValueError unless the planes of K and of V, from a file, can be codes of heads with so many channels."""

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        token, fixed = super().cost(config, dtype, sink)
        tables = sum(width * kind.itemsize for width, kind in self.table_shapes(config.head_dim))
        return token, fixed + config.num_key_value_heads * tables

    def notice(self, n: int) -> str:
        few = f"its tables are fitted to a prompt of {n} tokens, and later ones use them too; few tokens fit badly"
        return "" if n >= FIT_TOKENS // 4 else few

    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        tables = zip(*(self._tables(row, ctx) for row in rows), strict=True)
        return tuple(make(torch.cat(x)) for make, x in zip(self.codec_types(ctx), tables, strict=True))

    def _tables(self, row: Kept, ctx: Context) -> tuple[Tensor, Tensor]:
        """(1,Hkv,W) for K and for V of one row."""
        if row.state is not None:
            return row.state.tables
        heads, k = [], unrotated_keys(row.k, row.pos, ctx.inv_freq)
        for h, n in enumerate(row.length[0].tolist()):
            some = torch.linspace(0, n - 1, min(n, FIT_TOKENS), device=k.device).round().long()
            heads.append(self.fit(k[0, h, some], row.v[0, h, some].float()))
        return tuple(torch.stack(x)[None] for x in zip(*heads, strict=True))


def unrotated_keys(k: Tensor, pos: Tensor, inv_freq: Tensor) -> Tensor:
    """Keys (B,Hkv,T,D) that were rotated to pos (B,·,T), as they were before: fp32."""
    return rotated_keys(k, -pos, inv_freq)


def rotated_keys(k: Tensor, pos: Tensor, inv_freq: Tensor) -> Tensor:
    """The inverse."""
    heads = k.float().flatten(0, 1)[:, None]  # each head has positions of its own, like a row
    return rotate_more(heads, pos.expand(k.shape[:3]).flatten(0, 1), inv_freq).view(k.shape)


def k_means(x: Tensor, k: int) -> Tensor:
    """x (…,n,c) → k centroids (…,k,c): evenly spaced ones of the n, and then some rounds of Lloyd's algorithm."""
    n = x.shape[-2]
    start = torch.linspace(0, n - 1, k, device=x.device).round().long()
    centroids = x.index_select(-2, start)
    for _ in range(ROUNDS):
        index = nearest(x, centroids)[..., None]
        count = torch.zeros_like(centroids[..., :1]).scatter_add_(-2, index, torch.ones_like(x[..., :1]))
        total = torch.zeros_like(centroids).scatter_add_(-2, index.expand_as(x), x)
        centroids = torch.where(count > 0, total / count.clamp(min=1), centroids)
    return centroids


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """(…,n) int64: for each of x (…,n,c) the index of the nearest of the centroids (…,k,c)."""
    # |x − c|² is least where x·c − |c|²/2 is largest
    closeness = (x @ centroids.mT).sub_((centroids.square().sum(-1, keepdim=True) / 2).mT)
    return closeness.argmax(-1)
