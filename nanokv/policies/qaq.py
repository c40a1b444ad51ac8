"""Bits by error: a token gets few bits if rounding it would hardly change what attention returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class QAQ(Policy):
    """QAQ (Dong et al. 2024, arXiv:2403.04643, §3): the error that a key or value may have, so that attention's output
    stays within `epsilon`, follows from the queries' length and from the most attention that one of the last `window`
    queries gives the token. Where codes of `low` bits stay below both, the token goes to the low-precision tier. New
    tokens stay exact and are judged in blocks of `every`.

    While decoding, tokens are judged among the new ones only, which share out the attention. Deviations: there are two
    bit widths, where the paper has one per token, and one for both K and V; the queries' length is measured, squared and
    of logits divided by √D, where the authors' code has a constant; outliers are left to the rotation of the store's codes.

    epsilon  error that attention's output may have, per token
    low      bits of the low-precision tier; the store must have the same: `mixed:low=`
    window   last queries whose attention counts; the last window tokens, of the prompt and of a block, get the high bits
    every    new tokens that are judged at once
    """

    epsilon: float = 0.004
    low: int = 2
    window: int = 16
    every: int = 100
    default_store = "mixed:high=4"
    demotes = True
    scores_once = True

    def __post_init__(self):
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)) or self.low not in (2, 3, 4):
            raise ValueError(f"qaq:epsilon={self.epsilon},low={self.low}; epsilon is more than 0 and low is 2, 3 or 4")
        if self.window < 1 or 0 != self.every <= self.window:
            raise ValueError(
                f"qaq:window={self.window},every={self.every}; window is at least 1, and every is 0 or more than window"
            )

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window, over_group="max", over_queries="max", query_moments=0)

    @property
    def low_bits(self) -> int:
        return self.low

    @property
    def rescore_every(self) -> int:
        return self.every

    def keep(self, p: Prompt) -> Kept:
        n, levels = max(2, p.seen), 2**self.low - 1
        range_k, range_v = (x.float().amax(-1) - x.float().amin(-1) for x in (p.k, p.v))  # (1,Hkv,N)
        q_squared = (p.q_mean.square() + p.q_cov.diagonal(dim1=-2, dim2=-1)).mean(-1)  # (readers,H): E|q|² / D
        q_squared = q_squared.unflatten(1, (p.k.shape[1], -1)).amax((0, 2))[None, :, None]
        error_k = (12 * math.log(n**3 / (n - 1) * self.epsilon**2 + 1) / q_squared).sqrt()
        error_v = math.sqrt(12 / n) * self.epsilon / p.attention.amax(0, keepdim=True)
        low = (range_k <= 2 * levels * error_k) & (range_v <= 2 * levels * error_v)
        high = p.valid & (~low | p.recent(self.window))
        return Kept.top(p, high.float(), high.sum(-1, dtype=torch.int32)).demote_others(p)
