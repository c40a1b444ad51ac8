"""A token stays as long as some recent query looks at it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import Ask
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class CORM(Policy):
    """CORM (Dai et al. 2024, arXiv:2404.15949, §4): a query hits a key if it gives it at least an even share of its attention. Kept is what
    any of the last `window` queries hit, and the last `recent` tokens. There is no budget: heads keep as much as they use.

    A KV head counts the hits of all its query heads. Deviation: decided every `every` tokens, where the paper does at each one.
    """

    window: int = 256
    recent: int = 256
    every: int = 64
    watches = Ask(group="max")
    store = "ragged"

    def __post_init__(self):
        if min(self.window, self.recent, self.every) < 1:
            raise ValueError(
                f"corm:window={self.window},recent={self.recent},every={self.every} is out of range; each at least 1"
            )

    @property
    def ask(self) -> Ask:
        return Ask(rows=self.window, stat="hit", group="max")

    def keep(self, p: Prompt) -> Kept:
        hit = p.votes.amax(0, keepdim=True)  # one more than the position, so 0 is never
        stays = p.real & ((hit > max(0, p.seen - self.window)) | p.last(self.recent))
        return Kept.top(p, stays.float(), stays.sum(-1), votes=hit)

    def watch(self, s: Slots, votes: Tensor, pos: Tensor) -> Tensor:
        hit = votes.amax(0) >= 1 / s.length[..., None]
        return torch.where(hit, pos[:, None] + 1.0, s.votes[:, :, : votes.shape[3]])
