"""Uniform codes whose error is made up for: outliers stay exact, and the rest of the error is approximated by a product of
low rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import merge, part_of
from nanokv.cache.context import Context
from nanokv.stores.quant.codec import HALF_MAX, check_places
from nanokv.stores.quant.grouped import Planes
from nanokv.stores.quant.int import Int

DECODE_BLOCK = 1024  # tokens decoded before attention reads them, where the backend names no number


@dataclass(frozen=True, kw_only=True)
class Gear(Int):
    """GEAR (Kang et al. 2024, arXiv:2403.05527, §3). Of each channel of K and each token of V, the largest and the smallest
    numbers stay exact and the mean takes their place; what is left is rounded as in `int`; and the matrix of what rounding
    lost, one per head, is stored as a product of two factors A·B of low rank.

    Deviations: the prompt is encoded in groups of tokens, each with outliers and factors of its own, as the paper does it
    for the tokens that follow; the number of outliers is given, not their share; keys and values are built from their
    three parts before attention reads them, where the authors' kernel multiplies by the factors.

    k         bits of K: 8, 4 or 2
    v         bits of V
    group     tokens of K, and channels of V, that share a scale; the tokens of a group share their factors
    residual  last tokens that stay exact, at least
    pin       first tokens that stay exact
    rank      rank of the factors; 0: none
    outliers  exact numbers at either end, of each channel of K in a group and of each token of V; 0: none
    """

    rank: int = 2
    outliers: int = 1
    kernels = ("quantize",)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.rank <= self.group or not 0 <= 2 * self.outliers <= min(self.group, 256):
            raise ValueError(
                f"rank={self.rank},outliers={self.outliers}; with group={self.group} the rank is 0 to {self.group}, and "
                f"outliers are 0 to {min(self.group, 256) // 2}"
            )

    def incompatible_model(self, config: Any) -> str:
        dim = config.head_dim
        if max(self.rank, 2 * self.outliers) > dim:
            return f"its heads have {dim} channels; rank={self.rank} and twice outliers={self.outliers} may be no more"
        if self.outliers and max(self.group, dim) > 256:
            return (
                f"an outlier's place is a byte; group={self.group} and this model's {dim} channels may be 256 at most"
            )
        return super().incompatible_model(config)

    def grouped_token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        factors = 2 * 2 * self.rank * (1 + dim / self.group)  # fp16, of K and of V
        outliers = 2 * self.outliers * (1 + dtype.itemsize) * (1 + dim / self.group)
        return super().grouped_token_bytes(dim, dtype) + factors + outliers

    def encode(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[Planes, Planes]:
        """As `Int.encode`, and behind the zero point: outliers (…,2m,D) for K and (…,group,2m) for V, where they stand
        (uint8, of the same shape), and the factors (…,group,r) and (…,r,D).
        """
        without_k, *outliers_k = _without_outliers(k, self.outliers, -2)
        without_v, *outliers_v = _without_outliers(v, self.outliers, -1)
        planes = super().encode(without_k, without_v, ctx)
        rounded = super().decode(ctx.ops, *planes)
        factors = (_factors(x.float() - y, self.rank) for x, y in zip((without_k, without_v), rounded, strict=True))
        return tuple((*a, *b, *c) for a, b, c in zip(planes, (outliers_k, outliers_v), factors, strict=True))

    def check_codes(self, k: Planes, v: Planes) -> None:
        check_places(k[4], self.group)
        check_places(v[4], v[6].shape[-1])

    def decode(self, ops: Any, k: Planes, v: Planes) -> tuple[Tensor, Tensor]:
        rounded = super().decode(ops, k[:3], v[:3])
        found = []
        for x, (outliers, at, a, b), dim in zip(rounded, (k[3:], v[3:]), (-2, -1), strict=True):
            found.append((x + a.float() @ b.float()).scatter(dim, at.long(), outliers.float()))
        return tuple(found)

    def attend(
        self,
        ops: Any,
        q: Tensor,
        k: Planes,
        v: Planes,
        length: Tensor | None,
        key_pos: Tensor,
        query_pos: Tensor,
        sliding_window: int | None,
        exact: tuple[Tensor, Tensor, Tensor | None, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        parts = []
        if exact is not None:
            parts.append(ops.decode(q, *exact, query_pos, sliding_window)[:2])
        n, at_once = k[0].shape[2], max(1, (ops.unpack_block or DECODE_BLOCK) // self.group)
        # a loop over blocks would be another graph for each number of groups
        starts = [0] if torch.compiler.is_compiling() else range(0, n, at_once)
        for a in starts:
            b = n if torch.compiler.is_compiling() else min(a + at_once, n)
            some = ([x[:, :, a:b] for x in planes] for planes in (k, v))
            block = [x.flatten(2, 3).to(q.dtype) for x in self.decode(ops, *some)]
            start, end = a * self.group, b * self.group
            held, pos = part_of(length, start, end), key_pos[:, :, start:end]
            parts.append(ops.decode(q, *block, held, pos, query_pos, sliding_window)[:2])
        return merge(parts)


def _without_outliers(x: Tensor, n: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x with the n largest and n smallest numbers along `dim` replaced by the mean, these numbers, and where they stood."""
    order = x.argsort(dim=dim, stable=True)
    size = x.shape[dim]
    at = torch.cat((order.narrow(dim, 0, n), order.narrow(dim, size - n, n)), dim)
    mean = x.mean(dim, keepdim=True).expand(at.shape)
    return x.scatter(dim, at, mean), x.gather(dim, at), at.to(torch.uint8)


def _factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """x (…,n,D) fp32 → fp16 (…,n,r) and (…,r,D), whose product is close to the best approximation of that rank. Two rounds
    of power iteration from fixed random numbers, as in the paper's appendix.
    """
    b = torch.randn(x.shape[-1], rank, generator=torch.Generator().manual_seed(0)).to(x.device)
    b = torch.linalg.qr(x.mT @ (x @ b))[0]
    a = torch.linalg.qr(x @ b)[0]
    return a.half(), (a.mT @ x).clamp(-HALF_MAX, HALF_MAX).half()
