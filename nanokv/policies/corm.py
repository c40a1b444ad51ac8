"""A token stays as long as some recent query gives it attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class CORM(Policy):
    """CORM (Dai et al. 2024, arXiv:2404.15949, §4): a query hits a key if it gives the key at least an even share of
    its attention. Tokens stay that any of the last `window` queries hit, and the last `recent` tokens. There is no
    budget: a head keeps as much as it uses.

    A KV head counts the hits of all its query heads. Deviation: tokens are evicted every `every` tokens, in the paper
    at each one.

    window  last queries that may hit a token
    recent  last tokens that always stay
    every   tokens between two evictions
    """

    window: int = 256
    recent: int = 256
    every: int = 64
    decode_request = ScoreRequest(over_group="max")
    default_store = "ragged"

    def __post_init__(self):
        if min(self.window, self.recent, self.every) < 1:
            raise ValueError(
                f"corm:window={self.window},recent={self.recent},every={self.every} is out of range; each at least 1"
            )

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window, over_queries="last_hit", over_group="max")

    @property
    def rescore_every(self) -> int:
        return self.every

    def keep(self, p: Prompt) -> Kept:
        hit = p.attention.amax(0, keepdim=True)  # 1 + the position of the last hit; 0: never hit
        stays = p.valid & ((hit > max(0, p.seen - self.window)) | p.recent(self.recent))
        return Kept.top(p, stays.float(), stays.sum(-1), running_scores=hit)

    def update_scores(self, s: Slots, attention: Tensor, pos: Tensor) -> Tensor:
        hit = attention.amax(0) >= 1 / s.length[..., None]
        return torch.where(hit, pos[:, None] + 1.0, s.running_scores[:, :, : attention.shape[3]])
