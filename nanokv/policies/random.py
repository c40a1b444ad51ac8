"""The honest floor: what a policy is worth is what it does better than chance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanokv.contract import Case, Kept, Policy, Prompt, check_budget


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """The last `window` tokens and uniformly random others, per KV head (no paper).

    The window is SnapKV's, so that the difference to it is the score alone. Reproducible: the choice depends on seed,
    layer and prompt length, not on the batch.
    """

    budget: int | str = 1024
    window: int = 32
    seed: int = 0

    def __post_init__(self):
        if self.window < 1 or not 0 <= self.seed < 2**40:
            raise ValueError(
                f"random:window={self.window},seed={self.seed} is out of range; window ≥ 1, seed from 0 to 2^40 − 1"
            )
        check_budget(self.budget, self.window, f"the window of {self.window} is always kept")

    def fit(self, case: Case) -> Random:
        return replace(self, budget=case.tokens(self.budget, self.window))

    def with_budget(self, budget: int | str) -> Random:
        return replace(self, budget=budget)

    def holds(self, n: int) -> int:
        return min(n, self.budget)

    def keep(self, p: Prompt) -> Kept:
        dice = torch.Generator().manual_seed(self.seed * 1_000_003 + p.layer)
        score = torch.rand(p.pos.shape, generator=dice).to(p.k.device)
        return Kept.top(p, score.masked_fill(p.last(self.window), torch.inf), self.budget)
