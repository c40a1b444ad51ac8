"""What was looked at stays looked at: tokens that queries pass over go, many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import Ask
from nanokv.cache.slots import Slots
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Scissorhands(Scorer):
    """Scissorhands (Liu et al. 2023, arXiv:2305.17118, §4, algorithms 1 and 2): a token's count goes up with each query that gives it less
    than an even share of its attention; when the budget is reached, the `every` tokens of highest count go, but the last `recent`.

    Deviations: tokens go on a schedule, every `every` of them, when those to come could exceed the budget (the paper waits until they
    do), so that of a long text a head holds budget − every to budget; the prompt's last `window` queries count and then every one,
    where the paper forgets those more than `window` ago; `every` is a number of tokens, half the budget in the paper; a KV head
    counts the mean of its query heads.
    """

    every: int = 128
    window: int = 400
    recent: int = 10
    watches = Ask()
    beside = 0

    def __post_init__(self):
        if min(self.every, self.window, self.recent) < 1:
            raise ValueError(
                f"scissorhands:every={self.every},window={self.window},recent={self.recent} is out of range; each at least 1"
            )
        super().__post_init__()

    @property
    def ask(self) -> Ask:
        return Ask(rows=self.window, stat="low")

    @property
    def least(self) -> int:
        return self.recent + self.every

    @property
    def why(self) -> str:
        return f"{self.recent} recent tokens stay while {self.every} go at a time"

    def keep(self, p: Prompt) -> Kept:
        return self.best(p, self.count(p) - self.every, votes=p.votes.sum(0, keepdim=True))

    def score(self, p: Prompt) -> Tensor:
        return (-p.votes.sum(0, keepdim=True)).masked_fill(p.last(self.recent), torch.inf)

    def watch(self, s: Slots, votes: Tensor, pos: Tensor) -> Tensor:
        return s.votes[:, :, : votes.shape[3]] + (votes < 1 / s.length[..., None]).sum(0)
