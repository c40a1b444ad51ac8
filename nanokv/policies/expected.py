"""What queries to come will look at, were they distributed as those so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import Ask
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
    """Expected Attention (Devoto et al. 2025, arXiv:2510.00636, §3): with queries before rotation as a Gaussian and the rotation averaged
    over the next `future` positions, E[exp(q·k/√D)] has a closed form; a key's share of it, times its value's norm, is its score.

    The first `sink` tokens always stay, and their queries do not count. Deviation: with every=n, mean and covariance are those of the
    last 128 queries, not of the prompt.
    """

    sink: int = 4
    future: int = 512

    def __post_init__(self):
        if self.sink < 0 or self.future < 1:
            raise ValueError(f"expected:sink={self.sink},future={self.future} is out of range; sink ≥ 0, future ≥ 1")
        super().__post_init__()

    @property
    def ask(self) -> Ask:
        return Ask(moments=self.sink)

    @property
    def least(self) -> int:
        return self.sink + 1

    def score(self, p: Prompt) -> Tensor:
        angle = torch.arange(p.seen, p.seen + self.future, device=p.k.device)[:, None] * p.inv_freq
        cos, sin = angle.cos().mean(0).repeat(2), angle.sin().mean(0).repeat(2)

        def turn(x: Tensor) -> Tensor:  # the mean rotation, along the last axis
            low, high = x.chunk(2, -1)
            return x * cos + torch.cat((-high, low), -1) * sin

        k, D = p.k.float(), p.k.shape[-1]
        group = p.q_mean.shape[1] // k.shape[1]
        mean = turn(p.q_mean).unflatten(1, (-1, group))[..., None]  # (readers,Hkv,G,D,1)
        cov = turn(turn(p.q_cov).mT).unflatten(1, (-1, group))
        k = k[:, :, None]
        logit = (k @ mean)[..., 0] / math.sqrt(D) + ((k @ cov) * k).sum(-1) / (2 * D)  # (readers,Hkv,G,N)
        counts = p.real & ~p.first(self.sink)
        share = logit.masked_fill(~counts[:, :, None], -torch.inf).softmax(-1).mean(2).sum(0, keepdim=True)
        return (share * p.v.float().norm(dim=-1)).masked_fill(p.first(self.sink), torch.inf)
