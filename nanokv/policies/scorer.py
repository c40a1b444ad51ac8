"""What all methods that rank tokens share: a budget, its split over layers and heads, whole chunks, looking again while decoding.

A method of its own says how good a token is, `score`; one that also evicts while decoding is an `Evicting`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanokv.cache.budget import Case, check_budget
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Scorer(Policy):
    """Keep the `budget` best tokens of each KV head.

    layers=pyramid (PyramidKV, Cai et al. 2024, arXiv:2406.02069, §3): deeper layers get less, on a line from 2 − 1/beta to 1/beta of
    the mean. Deviations: rounded so that the sum is exactly that of `flat`, where the authors' code overspends by about 1 %; short prompts
    have a flatter line instead of none.
    heads=ada (Ada-KV, Feng et al. 2024, arXiv:2407.11550, §3): the heads of a layer compete, each sure of `floor` of its share, at least of
    one token.
    Deviation: what is sure is taken first, so that the sum is exact; the authors blend two budgets and round.
    select=chunk (ChunkKV, Liu et al. 2025, arXiv:2502.00299, §3): tokens stay or go in runs of `chunk` by their mean score, the same runs
    in all heads unless they compete. Deviation: the last run is cut where the budget ends.
    demote=true: what does not stay is not dropped but held more coarsely (MiKV, Yang et al. 2024, arXiv:2402.18096), by store mixed.
    every=n: after each n new tokens what is held is judged anew, so that a head (of those that compete: the mean) never holds more than
    budget + n.
    """

    budget: int | str = 1024
    layers: str = "flat"  # flat | pyramid
    heads: str = "flat"  # flat | ada
    select: str = "token"  # token | chunk
    every: int = 0
    beta: int = 20
    floor: float = 0.2
    chunk: int = 20
    demote: bool = False

    beside = None  # how many slots new tokens get beside the budget; none: as many as come
    least = 1  # tokens that stay whatever their score; also the smallest budget

    def __post_init__(self):
        for key, allowed in (
            ("layers", ("flat", "pyramid")),
            ("heads", ("flat", "ada")),
            ("select", ("token", "chunk")),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)} is unknown; {key} is {' or '.join(allowed)}")
        if self.beta < 1 or not 0 <= self.floor <= 1 or self.chunk < 1:
            raise ValueError(
                f"beta={self.beta},floor={self.floor},chunk={self.chunk}; beta ≥ 1, floor 0 … 1, chunk ≥ 1"
            )
        if self.every < 0:
            raise ValueError(f"every={self.every}; give a number of tokens, or 0 for never")
        if self.every and not self.watches and self.every < self.ask.tail:
            raise ValueError(
                f"every={self.every} is too often, as the last {self.ask.tail} tokens judge; give more, or 0"
            )
        check_budget(self.budget, self.least, self.why)

    @property
    def why(self) -> str:
        return f"a head always keeps {self.least}"

    @property
    def store(self) -> str:
        return "mixed" if self.demote else "ragged" if self.heads == "ada" else "dense"

    @property
    def demotes(self) -> bool:
        return self.demote

    def fit(self, case: Case) -> Scorer:
        if self.heads == "ada" and case.pads and isinstance(self.budget, str) and not self.budget.endswith("%"):
            raise ValueError(
                f"a budget of {self.budget} cannot be held with heads=ada in a store that pads heads to the longest; "
                "use store ragged, or give tokens or percent"
            )
        if self.demote and isinstance(self.budget, str) and not self.budget.endswith("%"):
            raise ValueError(
                f"a budget of {self.budget} cannot be held where nothing is dropped; give tokens or percent"
            )
        beside = self.every if self.every and self.beside is None else self.beside
        return replace(self, budget=case.tokens(self.budget, self.least, beside))

    def with_budget(self, budget: int | str) -> Scorer:
        return replace(self, budget=budget)

    def holds(self, n: int) -> int:
        return min(n, self.budget)

    def keep(self, p: Prompt) -> Kept:
        return self.best(p, self.count(p))

    def best(self, p: Prompt, n: int, evict: bool = False, votes: Tensor | None = None) -> Kept:
        """The n best tokens of each head; evict: a head then stays at its number, and votes (1,Hkv,N) go with the tokens."""
        kept = self._best(p, n, evict, votes)
        return kept.demote(p) if self.demote else kept

    def _best(self, p: Prompt, n: int, evict: bool, votes: Tensor | None) -> Kept:
        if len(p) <= n:
            return Kept.all(p, n if evict else -1, votes=votes)
        score = self.score(p).float().masked_fill(~p.real, -torch.inf)
        if self.select == "chunk":
            score = self._of_chunks(score)
        share = self._shares(score, n) if self.heads == "ada" else n
        return Kept.top(p, score, share, share if evict else -1, votes=votes)

    @abstractmethod
    def score(self, p: Prompt) -> Tensor:
        """(1,Hkv,N), more is better; +inf for what must stay."""

    def count(self, p: Prompt) -> int:
        """How many tokens a head of this layer keeps, on average over heads."""
        if self.layers == "flat" or p.owners == 1:
            return self.budget
        past, last = self.budget - self.least, p.owners - 1
        top = min(2 * past - past / self.beta, max(past, p.visible - self.least))
        line = [top - rank * 2 * (top - past) / last for rank in range(p.owners)]
        whole = [int(x) for x in line]
        spare = past * p.owners - sum(whole)  # goes to the largest remainders
        lucky = sorted(range(p.owners), key=lambda rank: whole[rank] - line[rank])[:spare]
        return self.least + whole[p.rank] + (p.rank in lucky)

    def _shares(self, score: Tensor, n: int) -> Tensor:
        """(1,Hkv) int32: how many of the Hkv·n best tokens of the layer are each head's, after each has its sure ones."""
        sure = score.argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(self.floor * n))]
        rank = score.scatter(-1, sure, torch.inf).flatten(1).argsort(dim=-1, descending=True, stable=True)
        owner = rank[:, : score.shape[1] * n] // score.shape[2]
        return torch.stack([(owner == h).sum(-1) for h in range(score.shape[1])], -1).to(torch.int32)

    def _of_chunks(self, score: Tensor) -> Tensor:
        """Every token the mean of its run, without those that must stay, which keep theirs."""
        free, n = score.isfinite(), score.shape[-1]
        behind = (0, -n % self.chunk)
        total = pad(score.masked_fill(~free, 0), behind).unflatten(-1, (-1, self.chunk)).sum(-1)
        mean = total / pad(free, behind).unflatten(-1, (-1, self.chunk)).sum(-1).clamp(min=1)
        if self.heads == "flat":
            mean = mean.mean(1, keepdim=True).expand_as(mean)
        return torch.where(free, mean.repeat_interleave(self.chunk, -1)[..., :n], score)


@dataclass(frozen=True, kw_only=True)
class Evicting(Scorer):
    """A scorer that goes on while decoding: once the budget is reached, each new token takes the place of the least worthy one."""

    beside = 0

    def __post_init__(self):
        super().__post_init__()
        if self.every:
            raise ValueError(
                f"every={self.every}: this policy evicts at each token and never looks again; leave it out"
            )

    def keep(self, p: Prompt) -> Kept:
        return self.best(p, self.count(p), evict=True, votes=self.carry(p))

    def carry(self, p: Prompt) -> Tensor:
        """(1,Hkv,N): the votes to go on from."""
        return p.votes.sum(0, keepdim=True)

    def slot(self, s: Slots, pos: Tensor) -> Tensor:
        return s.weakest(self.worth(s, pos), pos)

    @abstractmethod
    def worth(self, s: Slots, pos: Tensor) -> Tensor:
        """(B,Hkv,S): the least goes when a token at pos (B,1) comes; +inf stays."""
