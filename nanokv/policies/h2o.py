"""Tokens that were looked at most, and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import Ask
from nanokv.cache.slots import Slots
from nanokv.policies.scorer import Evicting


@dataclass(frozen=True, kw_only=True)
class H2O(Evicting):
    """H2O (Zhang et al. 2023, arXiv:2306.14048, §4, algorithm 1): attention received adds up over all queries; the heaviest hitters
    stay, and the last `recent` of the budget whatever they received. Each new token then takes the lightest one's place.

    Default budget: the paper's 10 % heavy and 10 % recent. Deviations from the authors' code: one choice per KV head (the mean of its
    query heads), where theirs fits heads of their own only; a token makes room before it attends, so the budget holds at all times.
    """

    budget: int | str = "20%"
    recent: float = 0.5  # of the budget
    ask = Ask(rows=None)
    watches = Ask()

    def __post_init__(self):
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent={self.recent}; it is a share of the budget, from 0 to 1")
        super().__post_init__()

    def score(self, p: Prompt) -> Tensor:
        return self.carry(p).masked_fill(p.last(int(self.count(p) * self.recent)), torch.inf)

    def worth(self, s: Slots, pos: Tensor) -> Tensor:
        recent = (s.wanted.double() * self.recent).int()[..., None]  # in double, as `score` has it
        return s.votes.masked_fill(s.pos > pos[:, None] - recent, torch.inf)

    def watch(self, s: Slots, votes: Tensor, pos: Tensor) -> Tensor:
        return s.votes[:, :, : votes.shape[3]] + votes.sum(0)
