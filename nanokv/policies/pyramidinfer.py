"""The deeper the layer, the fewer tokens stay: those that the end of the prompt attends to, out of the layer before."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanokv.cache.budget import Workload, check_budget
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest, rounded
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class PyramidInfer(Policy):
    """PyramidInfer (Yang et al. 2024, arXiv:2405.12532, §3): the prompt's last `recent` tokens are the window. Its
    queries' attention scores of each earlier token are summed, the last query's counting 1.2 times as much as the
    first one's, and averaged over all heads. The first layer keeps everything. Each layer passes on to the next the
    window, the sinks and the tokens of highest score, of those that it keeps itself, so deeper layers keep subsets.

    Layer l of L passes on the share ratio + (1 − ratio)·(cos(π·l/L) + 1)/2 of its earlier tokens, rounded down, and
    all of them where that would be at most `context`.
    Deviations from the authors' code: the whole prompt is computed in every layer, where theirs drops the hidden
    states of the others too, so scores are of softmaxes over all tokens; generated tokens all stay; `budget` is ours.

    budget   tokens per KV head, averaged over the layers, or a percentage of the prompt; the ratio follows from it. none: `ratio` holds
    ratio    what share of its earlier tokens the last layer passes on
    recent   last tokens that always stay: a number, or a percentage of the prompt
    sink     first tokens that always stay
    context  a layer with no more earlier tokens to pass on than this passes on all
    """

    budget: int | str | None = None  # None: as `ratio` says
    ratio: float = 0.9
    recent: int | str = "20%"
    sink: int = 4
    context: int = 64
    cross_layer = True

    def __post_init__(self):
        if not 0 <= self.ratio <= 1 or self.sink < 0 or self.context < 0:
            raise ValueError(
                f"pyramidinfer:ratio={self.ratio},sink={self.sink},context={self.context} is out of range; "
                "ratio 0 … 1, sink and context ≥ 0"
            )
        check_budget(self.recent, 1, "the last token always stays")
        if self.budget is not None:
            check_budget(self.budget, 1, "the last token always stays")

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.recent if isinstance(self.recent, int) else None, over_queries="rising")

    def with_budget(self, budget: int | str) -> PyramidInfer:
        return replace(self, budget=budget)

    def fit(self, work: Workload) -> PyramidInfer:
        n = work.prompt_len
        # the released code takes one token more than the share
        recent = self.recent if isinstance(self.recent, int) else int(n * float(self.recent[:-1]) / 100) + 1
        mine = replace(self, recent=recent)
        if self.budget is None:
            return mine
        least = math.ceil(sum(replace(mine, ratio=0.0).sizes(n, work.owners)) / work.owners)
        budget = work.tokens(self.budget, least)
        if budget < least:
            raise ValueError(
                f"pyramidinfer:budget={self.budget}: with recent={self.recent} and context={self.context} the "
                f"{work.owners} layers keep {least} of {n} tokens at least; give that, or smaller values of these"
            )
        low, high = 0.0, 1.0  # the largest ratio that stays within the budget
        for _ in range(40):
            middle = (low + high) / 2
            fits = sum(replace(mine, ratio=middle).sizes(n, work.owners)) <= budget * work.owners
            low, high = (middle, high) if fits else (low, middle)
        return replace(mine, ratio=1.0 if budget >= n else low, budget=None)

    def sizes(self, n: int, layers: int) -> list[int]:
        """How many tokens each layer keeps of a prompt of n."""
        recent = min(n, self.recent)
        earlier = [n - recent]
        for layer in range(layers - 1):
            share = self.ratio + (1 - self.ratio) * (math.cos(math.pi * layer / layers) + 1) / 2
            passed = int(share * earlier[-1])
            earlier.append(passed if passed > self.context else earlier[-1])
        return [recent + x for x in earlier]

    def keep(self, p: Prompt) -> Kept:
        return self.keep_all([p])[0]

    def keep_all(self, prompts: list[Prompt]) -> list[Kept]:
        n = prompts[0].seen
        kept, sizes = [], self.sizes(n, len(prompts))
        stays = torch.ones(n, dtype=torch.bool, device=prompts[0].pos.device)  # by position; the same in all heads
        for p, passed_on in zip(prompts, [*sizes[1:], n], strict=True):
            mine = stays[p.pos.long()]
            kept.append(Kept.top(p, mine.float(), mine.sum(-1)))
            stays = self._best(p, stays, passed_on)
        return kept

    def _best(self, p: Prompt, stays: Tensor, n: int) -> Tensor:
        """Of the tokens that stay in this layer, (seen,) bool, the n for the next one."""
        score = torch.zeros(p.seen, dtype=torch.float32, device=stays.device)
        score[p.pos[0, 0].long()] = rounded(p.attention.sum(0).mean(0))  # 0 beyond the layer's own sliding window
        score[: self.sink] = torch.finfo(torch.float32).max
        score[-self.recent :] = torch.inf
        best = score.masked_fill(~stays, -torch.inf).argsort(descending=True, stable=True)[:n]
        return torch.zeros_like(stays).scatter(0, best, True) & stays
