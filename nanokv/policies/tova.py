"""The token that the newest query attends to least is evicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots
from nanokv.policies.scorer import EvictingScorer


@dataclass(frozen=True, kw_only=True)
class TOVA(EvictingScorer):
    """TOVA (Oren et al. 2024, arXiv:2401.06104, §3.2): the tokens stay that receive most attention from the last
    query, averaged over all heads of the layer; each new token takes the slot of the one that received least from the
    query before. No token is protected.

    Deviation from the authors' code: the slot is freed before the new token attends, so the budget holds at all times.
    """

    request = ScoreRequest(last_queries=1)
    decode_request = ScoreRequest()

    def __post_init__(self):
        if self.heads != "flat":
            raise ValueError(
                f"tova:heads={self.heads}; its heads keep the same tokens, so they cannot compete: use heads=flat"
            )
        super().__post_init__()

    def initial_scores(self, p: Prompt) -> Tensor:
        return p.attention.sum(0, keepdim=True).mean(1, keepdim=True).expand_as(p.pos).contiguous()

    def score(self, p: Prompt) -> Tensor:
        return self.initial_scores(p)

    def update_scores(self, s: Slots, attention: Tensor, pos: Tensor) -> Tensor:
        return attention.sum(0).mean(1, keepdim=True).expand(attention.shape[1:])
