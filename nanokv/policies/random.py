"""The honest floor: what a policy is worth is what it does better than chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Random(Scorer):
    """The last `window` tokens and uniformly random others, per KV head (no paper).

    The window is SnapKV's, so that the difference to it is the score alone. Reproducible: the choice depends on seed,
    layer and prompt length, not on the batch.
    """

    window: int = 32
    seed: int = 0

    def __post_init__(self):
        if self.window < 1 or not 0 <= self.seed < 2**40:
            raise ValueError(
                f"random:window={self.window},seed={self.seed} is out of range; window ≥ 1, seed from 0 to 2^40 − 1"
            )
        super().__post_init__()

    @property
    def least(self) -> int:
        return self.window

    def score(self, p: Prompt) -> Tensor:
        gone = p.seen - len(p)  # 0 after a prompt; another number whenever it looks again
        dice = torch.Generator().manual_seed((self.seed * 1_000_003 + p.layer + gone * 7_919) % 2**63)
        return torch.rand(p.pos.shape, generator=dice).to(p.k.device).masked_fill(p.last(self.window), torch.inf)
