"""Heavy hitters: the tokens that received most attention, and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots
from nanokv.policies.scorer import EvictingScorer


@dataclass(frozen=True, kw_only=True)
class H2O(EvictingScorer):
    """H2O (Zhang et al. 2023, arXiv:2306.14048, §4, algorithm 1): each token's attention scores add up over all
    queries; the heavy hitters stay, and the last tokens, a share `recent` of the budget, whatever their score. Each
    new token then evicts the token of the lowest score.

    Default budget: the paper's 10 % heavy hitters and 10 % recent tokens. Deviations from the authors' code: one
    choice per KV head (by the mean of its query heads), where theirs knows multi-head attention only; a token evicts
    before it attends, so the budget holds at all times.

    recent  share of the budget for the last tokens
    """

    budget: int | str = "20%"
    recent: float = 0.5  # of the budget
    request = ScoreRequest(last_queries=None)
    decode_request = ScoreRequest()

    def __post_init__(self):
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent={self.recent}; it is a share of the budget, from 0 to 1")
        super().__post_init__()

    def score(self, p: Prompt) -> Tensor:
        return self.initial_scores(p).masked_fill(p.recent(int(self.layer_budget(p) * self.recent)), torch.inf)

    def slot_scores(self, s: Slots, pos: Tensor) -> Tensor:
        recent = (s.asked_limit.double() * self.recent).int()[..., None]  # float64, to round as Python does in `score`
        return s.running_scores.masked_fill(s.pos > pos[:, None] - recent, torch.inf)

    def update_scores(self, s: Slots, attention: Tensor, pos: Tensor) -> Tensor:
        return s.running_scores[:, :, : attention.shape[3]] + attention.sum(0)
