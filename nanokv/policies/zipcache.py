"""Bits by salience: tokens that receive more attention get more bits."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class ZipCache(Policy):
    """ZipCache (He et al. 2024, arXiv:2405.14256, §4): the tokens of a head that receive most attention, a share
    `salient`, get the high bits, the others the low ones. A token's attention is divided by the number of queries
    that could see it, or early tokens would always win. New tokens stay exact and are scored in blocks of `every`, by
    the latest query.

    Deviations: all queries of the prompt are scored, where the authors sample a tenth of them; the latest query's
    attention is normalised over the tokens that it scores.

    salient  share of the tokens that get the high bits
    every    new tokens that are scored at once
    """

    salient: float = 0.6
    every: int = 100
    request = ScoreRequest(last_queries=None)
    rescore_request = ScoreRequest(last_queries=1)
    default_store = "mixed:high=4"
    demotes = True
    scores_once = True

    def __post_init__(self):
        if not 0 <= self.salient <= 1 or self.every < 0:
            raise ValueError(
                f"salient={self.salient},every={self.every}; salient is a share from 0 to 1, every a number of tokens or 0"
            )

    @property
    def rescore_every(self) -> int:
        return self.every

    def max_kept(self, n: int) -> int:
        return round(self.salient * n)

    def keep(self, p: Prompt) -> Kept:
        n_queries = (p.seen - p.pos).clamp(1, p.n_queries)
        return Kept.top(p, p.attention.sum(0, keepdim=True) / n_queries, round(self.salient * len(p))).demote_others(p)
