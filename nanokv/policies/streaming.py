"""Attention sinks and a rolling window."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanokv.contract import Case, Kept, Policy, Prompt, check_budget


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """StreamingLLM (Xiao et al. 2023, arXiv:2309.17453, §3.2): the first `sink` and the last `recent` tokens, forever.

    Deviations from the authors' code: keys stay rotated at their absolute positions, where theirs are rotated anew by their
    place in the cache (the distances within the window are the same, that to the sinks grows); the prompt itself attends in
    full and is trimmed once, where theirs is fed token by token.
    """

    sink: int = 4
    recent: int = 1020
    budget: int | str | None = None  # if given, recent = budget − sink

    def __post_init__(self):
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

    def fit(self, case: Case) -> StreamingLLM:
        if self.budget is None:
            return self
        return replace(self, recent=case.tokens(self.budget, self.sink + 1, grows=False) - self.sink, budget=None)

    def with_budget(self, budget: int | str) -> StreamingLLM:
        return replace(self, budget=budget)

    def holds(self, n: int) -> int:
        return min(n, self.sink + self.recent)

    def keep(self, p: Prompt) -> Kept:
        return Kept.all(p).edges(self.sink, self.recent, roll=True)
