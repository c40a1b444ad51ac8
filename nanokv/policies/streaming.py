"""Attention sinks and a recent window."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanokv.cache.budget import Workload, check_budget
from nanokv.cache.kept import Kept, Prompt
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """StreamingLLM (Xiao et al. 2023, arXiv:2309.17453, §3.2): the first `sink` and the last `recent` tokens, forever.

    positions=cache is the paper's: a token's position is its place in the cache, so a text may run far past the
    model's context. Keys stay rotated to their absolute positions; rotating the query back when it reads the sinks
    gives the same distances. Deviations from the authors' code: with the default, positions=absolute, the distance to
    the sinks grows with the text; the prompt attends in full and is trimmed once, where theirs is fed token by token.

    sink       first tokens that stay
    recent     last tokens that stay, as a ring
    budget     sink + recent as one number, percent or bytes; it then sets `recent`
    positions  absolute: places in the text; cache: places in the cache, as in the paper
    """

    sink: int = 4
    recent: int = 1020
    budget: int | str | None = None  # if given, recent = budget − sink
    positions: str = "absolute"  # absolute | cache

    def __post_init__(self):
        if self.positions not in ("absolute", "cache"):
            raise ValueError(f"streaming:positions={self.positions}; positions are absolute and cache")
        if self.sink < 0 or self.recent < 1:
            raise ValueError(
                f"streaming:sink={self.sink},recent={self.recent} is out of range; give sink ≥ 0 and recent ≥ 1"
            )
        if self.budget is not None:
            if self.recent != type(self).recent:
                raise ValueError(
                    "streaming: budget= and recent= say the same, recent = budget − sink; give one of them"
                )
            check_budget(self.budget, self.sink + 1, f"{self.sink} sinks and one recent token are always kept")

    eviction = "ring"

    @property
    def protected_sinks(self) -> int:
        return self.sink

    @property
    def positions_in_cache(self) -> bool:
        return self.positions == "cache"

    def fit(self, work: Workload) -> StreamingLLM:
        if self.budget is None:
            return self
        return replace(self, recent=work.tokens(self.budget, self.sink + 1, 0) - self.sink, budget=None)

    def with_budget(self, budget: int | str) -> StreamingLLM:
        return replace(self, budget=budget)

    def max_kept(self, n: int) -> int:
        return min(n, self.sink + self.recent)

    def keep(self, p: Prompt) -> Kept:
        return Kept.all(p).edges(self.sink, self.recent, ring=True)
