"""Tokens that received attention will receive it again: those that queries neglect are evicted, many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Scissorhands(Scorer):
    """Scissorhands (Liu et al. 2023, arXiv:2305.17118, §4, algorithms 1 and 2): a token's count rises with each query
    that gives it less than an even share of its attention. At the budget, the `every` tokens of highest count are
    evicted, but never the last `recent` ones.

    Deviations: tokens are evicted after every `every` new ones, before these can exceed the budget (the paper waits
    until they do), so a head holds budget − every to budget tokens of a long text; the prompt's last `window` queries
    count and then all later ones, where the paper forgets queries more than `window` ago; `every` is a number of
    tokens, in the paper half the budget; a KV head counts by the mean of its query heads.

    window  last queries of the prompt that count
    recent  last tokens that always stay
    """

    every: int = 128
    window: int = 400
    recent: int = 10
    decode_request = ScoreRequest()
    new_slots = 0

    def __post_init__(self):
        if min(self.every, self.window, self.recent) < 1:
            raise ValueError(
                f"scissorhands:every={self.every},window={self.window},recent={self.recent} is out of range; each at least 1"
            )
        if (self.merge, self.refit) != ("none", "none"):
            raise ValueError(
                "scissorhands: many tokens leave while decoding, so values stay as they are; use no merge= or refit="
            )
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window, over_queries="count_low")

    @property
    def min_budget(self) -> int:
        return self.recent + self.every

    @property
    def min_budget_reason(self) -> str:
        return f"{self.recent} recent tokens stay while {self.every} are evicted at a time"

    def keep(self, p: Prompt) -> Kept:
        return self.best(p, self.layer_budget(p) - self.every, running_scores=p.attention.sum(0, keepdim=True))

    def score(self, p: Prompt) -> Tensor:
        return (-p.attention.sum(0, keepdim=True)).masked_fill(p.recent(self.recent), torch.inf)

    def update_scores(self, s: Slots, attention: Tensor, pos: Tensor) -> Tensor:
        return s.running_scores[:, :, : attention.shape[3]] + (attention < 1 / s.length[..., None]).sum(0)
