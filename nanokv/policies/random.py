"""Random tokens stay: the baseline that a policy must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Random(Scorer):
    """The last `window` tokens and uniformly random others, per KV head (no paper).

    The window is SnapKV's, so the two policies differ in the score alone. The choice depends on seed, layer and
    prompt length, not on the batch, so it can be reproduced.

    window  last tokens that always stay
    seed    of the choice
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
    def min_budget(self) -> int:
        return self.window

    def score(self, p: Prompt) -> Tensor:
        evicted = p.seen - len(p)  # 0 after a prompt, another number at each rescore
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + p.layer + evicted * 7_919) % 2**63)
        return torch.rand(p.pos.shape, generator=generator).to(p.k.device).masked_fill(p.recent(self.window), torch.inf)
