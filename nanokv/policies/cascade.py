"""A chain of rings: the further back in the text, the sparser the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanokv.cache.budget import Workload, check_budget
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class CascadingKV(Policy):
    """Cascading KV cache (Willette et al. 2024, arXiv:2406.17808, §3): `sink` tokens and a chain of `rings` of equal
    size. A token that leaves one ring is offered to the next. Ring i accepts every 2^i-th offer; otherwise the
    offered token and the ring's newest token compare their averaged attention scores, and the lower one is evicted.
    So each ring holds half as dense a past as the one before.

    Tokens never move between slots: sorted by age, the rings lie one behind the other, so it is enough to find the
    token to evict. Deviations from the authors' code: keys stay at their absolute positions; the prompt attends in
    full and is then sorted into the rings by the mean attention that each token received, where theirs goes through
    it in strides. A new token's average begins at 0 and has a whole ring's time to settle before it is compared.

    budget  tokens per head, percent or bytes: sinks and rings together
    sink    first tokens that always stay
    rings   number of rings, all of one size
    """

    budget: int | str = 1024
    sink: int = 4
    rings: int = 4
    request = ScoreRequest(last_queries=None)
    decode_request = ScoreRequest()
    eviction = "score"

    def __post_init__(self):
        if self.sink < 0 or not 1 <= self.rings <= 30:
            raise ValueError(
                f"cascade:sink={self.sink},rings={self.rings} is out of range; sink ≥ 0, rings ≥ 1 and ≤ 30"
            )
        check_budget(self.budget, self.min_budget, f"{self.sink} sinks and one token in each ring are always kept")

    @property
    def min_budget(self) -> int:
        return self.sink + self.rings

    def fit(self, work: Workload) -> CascadingKV:
        return replace(self, budget=work.tokens(self.budget, self.min_budget, 0))

    @property
    def protected_sinks(self) -> int:
        return self.sink

    def with_budget(self, budget: int | str) -> CascadingKV:
        return replace(self, budget=budget)

    def max_kept(self, n: int) -> int:
        return min(n, self.budget)

    def keep(self, p: Prompt) -> Kept:
        n_queries = (p.seen - p.pos).clamp(min=1)  # how many queries could see each token
        mean = (p.attention.sum(0, keepdim=True) / n_queries).mean(1, keepdim=True).expand_as(p.pos).contiguous()
        size, first = (self.budget - self.sink) // self.rings, int(p.pos[0, 0, 0])
        score, held = mean[0, 0].tolist(), []  # held: positions, the newest first, without the sinks
        for t in range(max(first, self.sink), p.seen):
            if len(held) == size * self.rings:
                a, b = self.rivals(t, size)
                held.pop(b if b == a or score[held[a] - first] >= score[held[b] - first] else a)
            held.insert(0, t)
        stays = p.sinks(self.sink)
        stays[..., [t - first for t in held]] = True
        sink = max(0, self.sink - first)
        return Kept.top(p, stays.float(), stays.sum(-1), sink + size * self.rings, sink, running_scores=mean)

    def rivals(self, t: int, size: int) -> tuple[int, int]:
        """Which two held tokens, counted from the newest, compete when token t comes to full rings.

        They are the offered token and the newest token of the first ring that does not accept; twice the oldest token
        if all accept.
        """
        ring = next((i for i in range(1, self.rings) if (t - self.sink) % 2**i), self.rings)
        return ring * size - 1, min(ring * size, self.rings * size - 1)

    def slot_scores(self, s: Slots, pos: Tensor) -> Tensor:
        size, n = ((s.asked_limit - s.sink) // self.rings)[..., None], (pos - self.sink)[:, None]
        ring = torch.full_like(n, self.rings)
        for i in reversed(range(1, self.rings)):
            ring = torch.where(n % 2**i != 0, i, ring)
        offered, rival = ring * size - 1, torch.minimum(ring * size, self.rings * size - 1)  # see `rivals`
        age = s.pos.argsort(dim=-1, descending=True).argsort(dim=-1)  # per slot, how many tokens are younger
        return s.running_scores.masked_fill((age != offered) & (age != rival), torch.inf)

    def update_scores(self, s: Slots, attention: Tensor, pos: Tensor) -> Tensor:
        keeps = (-math.log(100) * self.rings / (s.asked_limit - s.sink)).exp()[..., None]
        return keeps * s.running_scores[:, :, : attention.shape[3]] + (1 - keeps) * attention.sum(0).mean(
            1, keepdim=True
        )
