"""Tokens stay that the last queries attend to and whose keys do not repeat others; for long answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.policies.scorer import Scorer

KEYS_AT_ONCE = 1024  # of a head, whose similarity to all others exists at once


@dataclass(frozen=True, kw_only=True)
class RKV(Scorer):
    """R-KV (Cai et al. 2025, arXiv:2505.24133, §3): the score is `mix` times a token's importance minus 1 − `mix` times its
    redundancy. Importance is the mean attention of the last `window` queries, pooled over `kernel` neighbouring tokens
    by the maximum. Redundancy is the softmax over all tokens of the mean cosine similarity of a token's key to the
    others. A key does not count as redundant to the token whose last similar key (above `similar`) it is, so of a
    phrase that is said again and again the latest copy stays. What is held is scored again every `every` tokens.

    Defaults are the released code's, whose mix is 0.07 where the paper says 0.1. Deviations: the scores of the query
    heads of a KV head are joined after their softmax, in which the window's own keys count too; the released code
    joins logits, of the keys before the window.

    window   last queries that score; their own tokens always stay
    kernel   neighbouring tokens over which importance is pooled; odd
    mix      how much importance counts, 0 … 1
    similar  from which cosine on a key repeats another
    """

    budget: int | str = 2048
    every: int = 128
    window: int = 8
    kernel: int = 7
    mix: float = 0.07
    similar: float = 0.5

    def __post_init__(self):
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or not 0 <= self.mix <= 1:
            raise ValueError(
                f"rkv:window={self.window},kernel={self.kernel},mix={self.mix} is out of range; window ≥ 1, kernel odd and "
                "≥ 1, mix 0 … 1"
            )
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window, over_group="max")

    @property
    def min_budget(self) -> int:
        return self.window

    def score(self, p: Prompt) -> Tensor:
        recent = p.recent(self.window)
        attention = p.attention.mean(0, keepdim=True).masked_fill(recent, 0) / p.n_queries
        importance = max_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        return (self.mix * importance - (1 - self.mix) * self._redundancy(p)).masked_fill(recent, torch.inf)

    def _redundancy(self, p: Prompt) -> Tensor:
        """(1,Hkv,N): how much the keys of a head repeat each other; the sum over a head is 1."""
        keys, n = normalize(p.k.float(), dim=-1) * p.valid[..., None], len(p)
        place, total = torch.arange(n, dtype=torch.int32, device=keys.device), keys.new_zeros(p.pos.shape)
        for h, k in enumerate(keys[0]):
            for a in range(0, n, KEYS_AT_ONCE):
                cosine = k[a : a + KEYS_AT_ONCE] @ k.T  # (·,N)
                cosine.diagonal(a).zero_()  # a key and itself
                last = torch.where(cosine > self.similar, place, 0).amax(-1, keepdim=True)
                total[0, h] += cosine.scatter_(-1, last.long(), 0).sum(0)
        mean = total / p.valid.sum(-1, keepdim=True)
        return mean.masked_fill(~p.valid, -torch.inf).softmax(-1)
