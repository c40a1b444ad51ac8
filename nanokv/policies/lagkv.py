"""Tokens that stand out from those that follow them stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class LagKV(Scorer):
    """LagKV (Liang et al. 2025, arXiv:2504.04704, §3): behind the sinks the prompt is cut into partitions of `lag`
    tokens. Each channel of a partition is scaled by its smallest and largest value in the next partition. A token's
    score is the standard deviation over its scaled channels, as a softmax over the partition, averaged over K and V;
    no query is used.

    As in the authors' code a token counts by its rank within its partition, so every partition keeps equally many.
    The last partition, and the rest behind it, have no next one and stay. Deviation: where the budget is smaller than
    these, the most recent of them stay.

    sink  first tokens that always stay
    lag   tokens in a partition
    """

    sink: int = 4
    lag: int = 128

    def __post_init__(self):
        if self.sink < 0 or self.lag < 2:
            raise ValueError(f"lagkv:sink={self.sink},lag={self.lag} is out of range; sink ≥ 0, lag ≥ 2")
        super().__post_init__()

    @property
    def min_budget(self) -> int:
        return max(1, self.sink)

    def score(self, p: Prompt) -> Tensor:
        score = torch.full(p.pos.shape, torch.inf, device=p.k.device)
        for h, end in enumerate(p.valid[0].sum(-1).tolist()):
            first = int(p.sinks(self.sink)[0, h].sum())
            score[0, h, first:end] = self._ranks(p.k[0, h, first:end].float(), p.v[0, h, first:end].float())
        return score

    def _ranks(self, k: Tensor, v: Tensor) -> Tensor:
        """Scores (N,) of the tokens behind the sinks, k and v (N,D): 0 … lag−1 within a partition, more behind them."""
        score = self.lag + torch.arange(len(k), device=k.device, dtype=torch.float32)
        n = len(k) // self.lag - 1  # partitions that have a next one
        if n > 0:
            standing_out = (self._spread(k, n) + self._spread(v, n)) / 2  # (n,lag)
            score[: n * self.lag] = standing_out.argsort(dim=-1, stable=True).argsort(dim=-1).flatten().float()
        return score

    def _spread(self, x: Tensor, n: int) -> Tensor:
        """x (N,D) → (n,lag): how far each token's channels spread on the next partition's scale."""
        parts = x[: (n + 1) * self.lag].unflatten(0, (n + 1, self.lag))
        low, high = parts[1:].amin(1, keepdim=True), parts[1:].amax(1, keepdim=True)
        return ((parts[:-1] - low) / (high - low)).std(-1).softmax(-1)
