"""The further back, the sparser."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanokv.cache.budget import Case, check_budget
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import Ask
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class CascadingKV(Policy):
    """Cascading KV cache (Willette et al. 2024, arXiv:2406.17808, §3): `sink` tokens and a chain of `rings` of equal size. What falls out
    of one ring is offered to the next; ring i accepts every 2^i-th time, else the offered token and the ring's newest compare their
    averaged attention and the weaker is gone. So the past is kept at half the density from ring to ring.

    Slots never move: sorted by age the rings lie one behind the other, so only the token that leaves is looked for.
    Deviations from the authors' code: keys stay at their absolute positions; the prompt attends in full and is then sorted into the
    rings by the mean attention each token received, where theirs goes through it in strides. A new token's average begins at 0; it
    has a whole ring's time to settle before it is compared.
    """

    budget: int | str = 1024
    sink: int = 4
    rings: int = 4
    ask = Ask(rows=None)
    watches = Ask()

    def __post_init__(self):
        if self.sink < 0 or not 1 <= self.rings <= 30:
            raise ValueError(
                f"cascade:sink={self.sink},rings={self.rings} is out of range; sink ≥ 0, rings ≥ 1 and ≤ 30"
            )
        check_budget(self.budget, self.least, f"{self.sink} sinks and one token in each ring are always kept")

    @property
    def least(self) -> int:
        return self.sink + self.rings

    def fit(self, case: Case) -> CascadingKV:
        return replace(self, budget=case.tokens(self.budget, self.least, 0))

    def with_budget(self, budget: int | str) -> CascadingKV:
        return replace(self, budget=budget)

    def holds(self, n: int) -> int:
        return min(n, self.budget)

    def keep(self, p: Prompt) -> Kept:
        seen = (p.seen - p.pos).clamp(min=1)  # how many queries could look at each token
        mean = (p.votes.sum(0, keepdim=True) / seen).mean(1, keepdim=True).expand_as(p.pos).contiguous()
        size, first = (self.budget - self.sink) // self.rings, int(p.pos[0, 0, 0])
        score, held = mean[0, 0].tolist(), []  # held: the newest first, without the sinks
        for t in range(max(first, self.sink), p.seen):
            if len(held) == size * self.rings:
                a, b = self.rivals(t, size)
                held.pop(b if b == a or score[held[a] - first] >= score[held[b] - first] else a)
            held.insert(0, t)
        stays = p.first(self.sink)
        stays[..., [t - first for t in held]] = True
        sink = max(0, self.sink - first)
        return Kept.top(p, stays.float(), stays.sum(-1), sink + size * self.rings, sink, votes=mean)

    def rivals(self, t: int, size: int) -> tuple[int, int]:
        """Which two of the held tokens, by age, compete when token t comes to full rings: the offered one and the newest of the ring
        that does not just accept. Twice the oldest, if all do.
        """
        ring = next((i for i in range(1, self.rings) if (t - self.sink) % 2**i), self.rings)
        return ring * size - 1, min(ring * size, self.rings * size - 1)

    def slot(self, s: Slots, pos: Tensor) -> Tensor:
        size, n = ((s.wanted - s.sink) // self.rings)[..., None], (pos - self.sink)[:, None]
        ring = torch.full_like(n, self.rings)
        for i in reversed(range(1, self.rings)):
            ring = torch.where(n % 2**i != 0, i, ring)
        offered, rival = ring * size - 1, torch.minimum(ring * size, self.rings * size - 1)  # see `rivals`
        age = s.pos.argsort(dim=-1, descending=True).argsort(dim=-1)  # of each slot: how many are younger
        return s.weakest(s.votes.masked_fill((age != offered) & (age != rival), torch.inf), pos)

    def watch(self, s: Slots, votes: Tensor, pos: Tensor) -> Tensor:
        keeps = (-math.log(100) * self.rings / (s.wanted - s.sink)).exp()[..., None]
        return keeps * s.votes[:, :, : votes.shape[3]] + (1 - keeps) * votes.sum(0).mean(1, keepdim=True)
