"""Bits by salience: what is looked at gets more of them."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import Ask
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class ZipCache(Policy):
    """ZipCache (He et al. 2024, arXiv:2405.14256, §4): the share `salient` of a head's tokens that receives most attention gets the high
    bits, the rest the low ones. Attention received is divided by how many queries could see the token, or early ones would
    always win. New tokens stay exact and are judged in blocks of `every`, by the latest query.

    Deviations: all queries of the prompt vote, where the authors sample a tenth of them; the latest query's attention is taken
    among the tokens that it judges.
    """

    salient: float = 0.6
    every: int = 100
    ask = Ask(rows=None)
    again = Ask(rows=1)
    store = "mixed:high=4"
    demotes = True
    once = True

    def __post_init__(self):
        if not 0 <= self.salient <= 1 or self.every < 0:
            raise ValueError(
                f"salient={self.salient},every={self.every}; salient is a share from 0 to 1, every a number of tokens or 0"
            )

    def holds(self, n: int) -> int:
        return round(self.salient * n)

    def keep(self, p: Prompt) -> Kept:
        seen_by = (p.seen - p.pos).clamp(1, p.n_votes)
        return Kept.top(p, p.votes.sum(0, keepdim=True) / seen_by, round(self.salient * len(p))).demote(p)
