"""The token that the newest one looks at least goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import Ask
from nanokv.cache.slots import Slots
from nanokv.policies.scorer import Evicting


@dataclass(frozen=True, kw_only=True)
class TOVA(Evicting):
    """TOVA (Oren et al. 2024, arXiv:2401.06104, §3.2): the tokens to which the last query, averaged over all heads of the layer, pays most
    attention stay; each new token takes the place of the one that the token before it looked at least. No token is protected.

    Deviation from the authors' code: the place is made before the new token attends, so the budget holds at all times.
    """

    ask = Ask(rows=1)
    watches = Ask()

    def __post_init__(self):
        if self.heads != "flat":
            raise ValueError(
                f"tova:heads={self.heads}; its heads keep the same tokens, so they cannot compete: use heads=flat"
            )
        super().__post_init__()

    def carry(self, p: Prompt) -> Tensor:
        return p.votes.sum(0, keepdim=True).mean(1, keepdim=True).expand_as(p.pos).contiguous()

    def score(self, p: Prompt) -> Tensor:
        return self.carry(p)

    def worth(self, s: Slots, pos: Tensor) -> Tensor:
        return s.votes

    def watch(self, s: Slots, votes: Tensor, pos: Tensor) -> Tensor:
        return votes.sum(0).mean(1, keepdim=True).expand(votes.shape[1:])
