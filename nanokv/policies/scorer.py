"""What all policies that rank tokens share: a budget, its split over layers and heads, the choice of whole chunks, and
rescoring while decoding.

A method's own file defines `score`, how good a token is. A method that also evicts while decoding is an
`EvictingScorer`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanokv.cache.budget import Workload, check_budget, in_bytes
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import rounded
from nanokv.policies.base import Policy
from nanokv.policies.finish import REFIT_QUERIES, merged, refitted


@dataclass(frozen=True, kw_only=True)
class Scorer(Policy):
    """Keep the `budget` tokens of highest score in each KV head. Scores are rounded first (see `rounded`), and among equal
    ones the earlier token wins.

    budget  what is kept: tokens per KV head, a percentage of the prompt, or bytes of the whole cache
    layers  flat; pyramid: deeper layers get less (PyramidKV, Cai et al. 2024, arXiv:2406.02069, §3). What a layer
            gets beyond the smallest budget falls on a line from 2 − 1/beta to 1/beta of its mean over the layers.
            Deviations: the budgets are rounded so that their sum is exactly that of `flat`, where the authors' code
            overspends by about 1 %; a short prompt gets a flatter line instead of none.
            squeeze: layers whose attention changes the residual stream least get less (SqueezeAttention, Wang et al.
            2024, arXiv:2404.04793, §4). The layers are sorted into three classes by the cosine similarity of the
            stream before and after the attention, averaged over the prompt. The class of highest similarity gets the
            share `squeeze` of the budget, the others what that leaves. Deviations: the classes are the best ones
            (k-means in one dimension, exactly), not those of a random start; the sum is exactly that of `flat`, also
            where some layers would get more than the prompt has; an output projection's bias does not count.
            compete: the heads of all layers compete for one budget, as with heads=ada those of a layer.
    heads   flat, or ada: the heads of a layer compete for its budget (Ada-KV, Feng et al. 2024, arXiv:2407.11550, §3).
            Each head is guaranteed `floor` of its share and at least one token. Deviation: the guaranteed tokens are
            taken first, so the sum is exact; the authors blend two budgets and round.
    select  token, or chunk: tokens are kept or evicted in chunks of `chunk` by their mean score (ChunkKV, Liu et al.
            2025, arXiv:2502.00299, §3). All heads keep the same chunks unless they compete. Deviation: the last chunk
            is cut where the budget ends.
    every   after so many new tokens, what is held is scored again; 0: never. A head then never holds more than
            its layer's budget + every (where heads compete, this bounds their mean)
    beta    of layers=pyramid: how steep the line is
    squeeze  of layers=squeeze: what share of the budget the layers that change least get
    floor   of heads=ada: the guaranteed share
    chunk   of select=chunk: tokens in a chunk
    demote  whether evicted tokens move to the low-precision tier of the store `mixed` (MiKV, Yang et al. 2024,
            arXiv:2402.18096)
    merge   none, or nearest: evicted values are averaged into kept ones (nanokv/policies/finish.py)
    refit   none, or lsq: kept values are solved so that the layer's output stays (nanokv/policies/finish.py)
    """

    budget: int | str = 1024
    layers: str = "flat"  # flat | pyramid | squeeze | compete
    heads: str = "flat"  # flat | ada
    select: str = "token"  # token | chunk
    every: int = 0
    beta: int = 20
    squeeze: float = 0.3
    floor: float = 0.2
    chunk: int = 20
    demote: bool = False
    merge: str = "none"  # none | nearest
    refit: str = "none"  # none | lsq

    new_slots = None  # how many slots generated tokens get beside the budget; None: as many as are generated

    def __post_init__(self):
        for key, allowed in (
            ("layers", ("flat", "pyramid", "squeeze", "compete")),
            ("heads", ("flat", "ada")),
            ("select", ("token", "chunk")),
            ("merge", ("none", "nearest")),
            ("refit", ("none", "lsq")),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)} is unknown; {key} is {' or '.join(allowed)}")
        if self.beta < 1 or not 0 <= self.floor <= 1 or self.chunk < 1 or not 0 <= self.squeeze <= 1:
            raise ValueError(
                f"beta={self.beta},floor={self.floor},chunk={self.chunk},squeeze={self.squeeze}; beta ≥ 1, chunk ≥ 1, "
                "floor and squeeze 0 … 1"
            )
        if self.cross_layer and self.every:
            raise ValueError(
                f"every={self.every}: layers={self.layers} looks at the prompt only, so nothing is scored again; use "
                "layers=flat"
            )
        if self.layers == "compete" and self.heads != "ada":
            raise ValueError(f"layers=compete,heads={self.heads}: heads that compete across layers need heads=ada")
        for key in ("merge", "refit"):
            if getattr(self, key) != "none" and (self.every or self.demote):
                raise ValueError(
                    f"{key}={getattr(self, key)}: values are changed once, when tokens of the prompt are evicted; use "
                    "every=0 and demote=false"
                )
        if self.every < 0:
            raise ValueError(f"every={self.every}; give a number of tokens, or 0 for never")
        if self.every and not self.decode_request and self.every < self.request.buffered_queries:
            n = self.request.buffered_queries
            raise ValueError(
                f"every={self.every} is too often: a rescore needs {n} new queries; give at least {n}, or 0"
            )
        check_budget(self.budget, self.min_budget, self.min_budget_reason)

    @property
    def min_budget(self) -> int:
        """The tokens that stay whatever their score, which is also the smallest budget."""
        return 1

    @property
    def min_budget_reason(self) -> str:
        return f"a head always keeps {self.min_budget}"

    @property
    def default_store(self) -> str:
        return "mixed" if self.demote else "ragged" if self.heads == "ada" else "dense"

    @property
    def demotes(self) -> bool:
        return self.demote

    @property
    def rescore_every(self) -> int:
        return self.every

    @property
    def refit_queries(self) -> int:
        return REFIT_QUERIES if self.refit == "lsq" else 0

    @property
    def cross_layer(self) -> bool:
        return self.layers in ("squeeze", "compete")

    @property
    def wants_similarity(self) -> bool:
        return self.layers == "squeeze"

    def fit(self, work: Workload) -> Scorer:
        if in_bytes(self.budget) and self.heads == "ada" and work.pads_heads:
            raise ValueError(
                f"a budget of {self.budget} cannot be held with heads=ada in a store that pads heads to the longest; "
                "use store ragged, or give tokens or percent"
            )
        if in_bytes(self.budget) and self.demote:
            raise ValueError(
                f"a budget of {self.budget} cannot be held where nothing is evicted; give tokens or percent"
            )
        new_slots = self.every if self.every and self.new_slots is None else self.new_slots
        return replace(self, budget=work.tokens(self.budget, self.min_budget, new_slots))

    def with_budget(self, budget: int | str) -> Scorer:
        return replace(self, budget=budget)

    def max_kept(self, n: int) -> int:
        return min(n, self.budget)

    def keep(self, p: Prompt) -> Kept:
        return self.best(p, self.layer_budget(p))

    def keep_all(self, prompts: list[Prompt]) -> list[Kept]:
        if self.layers == "compete":
            return self._compete(prompts)
        most = max(prompts[0].n_visible, self.budget)
        budgets = self.squeezed_budgets([p.similarity for p in prompts], self.min_budget, most)
        return [replace(self, layers="flat", budget=n).keep(p) for p, n in zip(prompts, budgets, strict=True)]

    def squeezed_budgets(self, similarity: Sequence[float], least: int, most: int) -> list[int]:
        """The budget of each layer from its similarity, from `least` to `most` tokens."""
        n = len(similarity)
        if n < 3:
            return [self.budget] * n
        order = sorted(range(n), key=lambda i: similarity[i])

        def spread(a: int, b: int) -> float:
            values = [similarity[i] for i in order[a:b]]
            return sum((x - sum(values) / len(values)) ** 2 for x in values)

        cuts = ((i, j) for i in range(1, n - 1) for j in range(i + 1, n))
        _, first_of_last = min(cuts, key=lambda cut: spread(0, cut[0]) + spread(*cut) + spread(cut[1], n))
        few, others, last = max(least, int(self.squeeze * self.budget)), order[:first_of_last], order[first_of_last:]
        # what the others cannot hold, the last ones get
        for_others = min(n * self.budget - len(last) * few, len(others) * most)
        budgets = {}
        for layers, total in ((others, for_others), (last, n * self.budget - for_others)):
            for k, i in enumerate(sorted(layers)):
                budgets[i] = total // len(layers) + (k < total % len(layers))
        return [budgets[i] for i in range(n)]

    def _compete(self, prompts: list[Prompt]) -> list[Kept]:
        """The best tokens of all layers and heads: `budget` of them per head on average."""
        longest = max(len(p) for p in prompts)
        if longest <= self.budget:
            return [self.best(p, self.budget) for p in prompts]
        scores = [self._ranking(p) for p in prompts]
        joined = torch.cat([pad(x, (0, longest - x.shape[-1]), value=-torch.inf) for x in scores], 1)
        budgets = self._head_budgets(joined, self.budget).split([x.shape[1] for x in scores], 1)
        return [self._select(p, score, n) for p, score, n in zip(prompts, scores, budgets, strict=True)]

    def best(self, p: Prompt, n: int, capped: bool = False, running_scores: Tensor | None = None) -> Kept:
        """The best tokens, n per head (with heads=ada: n on average).

        capped: while decoding, each head stays at its number, and a new token takes the slot of an old one.
        running_scores (1,Hkv,N): numbers that go with the tokens.
        """
        if len(p) <= n:
            kept = Kept.all(p, n if capped else -1, running_scores=running_scores)
            return kept.demote_others(p) if self.demote else kept
        score = self._ranking(p)
        return self._select(
            p, score, self._head_budgets(score, n) if self.heads == "ada" else n, capped, running_scores
        )

    def _ranking(self, p: Prompt) -> Tensor:
        """(1,Hkv,N): rounded scores, under select=chunk each chunk's mean; −inf for padding."""
        score = rounded(self.score(p)).masked_fill(~p.valid, -torch.inf)
        return self._chunk_means(score) if self.select == "chunk" else score

    def _select(
        self, p: Prompt, score: Tensor, n: int | Tensor, capped: bool = False, running_scores: Tensor | None = None
    ) -> Kept:
        """The n tokens (a number, or (1,Hkv)) of each head that rank highest."""
        kept = Kept.top(p, self.refine(p, score, n), n, n if capped else -1, running_scores=running_scores)
        if self.merge == "nearest":
            kept = merged(p, kept)
        if self.refit == "lsq":
            kept = refitted(p, kept)
        return kept.demote_others(p) if self.demote else kept

    def refine(self, p: Prompt, score: Tensor, n: int | Tensor) -> Tensor:
        """The scores (1,Hkv,N) that choose each head's n tokens, once `score` has decided n. Two-stage methods override it."""
        return score

    @abstractmethod
    def score(self, p: Prompt) -> Tensor:
        """(1,Hkv,N): the score of each token, higher is better; +inf for tokens that must stay."""

    def layer_budget(self, p: Prompt) -> int:
        """How many tokens a head of this layer keeps, on average over its heads."""
        if self.layers != "pyramid" or p.owners == 1:
            return self.budget
        least = self.min_budget
        extra, last = self.budget - least, p.owners - 1
        top = min(2 * extra - extra / self.beta, max(extra, p.n_visible - least))
        line = [top - rank * 2 * (top - extra) / last for rank in range(p.owners)]
        budgets = [int(x) for x in line]
        rest = extra * p.owners - sum(budgets)  # one more token each for the layers that rounding cut most
        rounded_up = sorted(range(p.owners), key=lambda rank: budgets[rank] - line[rank])[:rest]
        return least + budgets[p.rank] + (p.rank in rounded_up)

    def _head_budgets(self, score: Tensor, n: int) -> Tensor:
        """(1,heads) int32: how many of the heads·n best tokens each head of score (1,heads,N) has. The guaranteed floor is
        allocated first.
        """
        heads = score.shape[1]
        guaranteed = score.argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(self.floor * n))]
        score = score.scatter(-1, guaranteed, torch.inf).masked_fill(score == -torch.inf, -torch.inf)
        best = score.flatten().argsort(descending=True, stable=True)[: heads * n]
        count = torch.zeros(heads, dtype=torch.int32, device=score.device)  # bincount would wait for the device
        return count.scatter_add_(0, best // score.shape[2], torch.ones_like(best, dtype=torch.int32))[None]

    def _chunk_means(self, score: Tensor) -> Tensor:
        """Each token's score replaced by its chunk's mean. Tokens that must stay do not count in the mean and keep
        their own.
        """
        free, n = score.isfinite(), score.shape[-1]
        padding = (0, -n % self.chunk)
        total = pad(score.masked_fill(~free, 0), padding).unflatten(-1, (-1, self.chunk)).sum(-1)
        mean = total / pad(free, padding).unflatten(-1, (-1, self.chunk)).sum(-1).clamp(min=1)
        if self.heads == "flat":
            mean = mean.mean(1, keepdim=True).expand_as(mean)
        return torch.where(free, mean.repeat_interleave(self.chunk, -1)[..., :n], score)


@dataclass(frozen=True, kw_only=True)
class EvictingScorer(Scorer):
    """A scorer that also evicts while decoding: at the budget, each new token takes the slot of the token with the
    lowest score.
    """

    new_slots = 0
    eviction = "score"

    def __post_init__(self):
        super().__post_init__()
        if self.every:
            raise ValueError(f"every={self.every}: this policy evicts at each token and never rescores; leave it out")
        if self.layers == "compete":
            raise ValueError(
                f"layers={self.layers}: this policy evicts at each token, so budgets must be fixed; leave it out"
            )

    def keep(self, p: Prompt) -> Kept:
        return self.best(p, self.layer_budget(p), capped=True, running_scores=self.initial_scores(p))

    def initial_scores(self, p: Prompt) -> Tensor:
        """(1,Hkv,N): the scores to which decode steps add."""
        return p.attention.sum(0, keepdim=True)
