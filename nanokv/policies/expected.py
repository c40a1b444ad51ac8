"""Expected attention scores of future queries, if these are distributed as the queries so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.model.rope import angles, rotate
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
    """Expected Attention (Devoto et al. 2025, arXiv:2510.00636, §3): queries before rotation are taken as Gaussian
    and the rotation is averaged over the next `future` positions, so E[exp(q·k/√D)] has a closed form. A key's share
    of it times its value's norm is its score.

    The first `sink` tokens always stay, and their queries do not count. Deviation: with every=n the mean and
    covariance are those of the last 128 queries, not of the prompt.

    sink     first tokens that always stay
    future   positions over which the rotation is averaged
    epsilon  added to each share before it is multiplied with the norm, so that the norm decides among tokens that
             no query is expected to read. kvpress's leaderboard sets epsilon=0.01,heads=ada
    """

    sink: int = 4
    future: int = 512
    epsilon: float = 0.0

    def __post_init__(self):
        if self.sink < 0 or self.future < 1 or self.epsilon < 0:
            raise ValueError(
                f"expected:sink={self.sink},future={self.future},epsilon={self.epsilon} is out of range; sink ≥ 0, "
                "future ≥ 1, epsilon ≥ 0"
            )
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(query_moments=self.sink)

    @property
    def min_budget(self) -> int:
        return self.sink + 1

    def score(self, p: Prompt) -> Tensor:
        future = torch.arange(p.seen, p.seen + self.future, device=p.k.device)[None]
        cos, sin = (x.mean(1)[0, 0] for x in angles(p.inv_freq, future))
        mean_rotation = (cos, sin)  # (D,) each

        k, D = p.k.float(), p.k.shape[-1]
        group = p.q_mean.shape[1] // k.shape[1]
        mean = rotate(p.q_mean, mean_rotation).unflatten(1, (-1, group))[..., None]  # (readers,Hkv,G,D,1)
        cov = rotate(rotate(p.q_cov, mean_rotation).mT, mean_rotation).unflatten(1, (-1, group))
        k = k[:, :, None]
        logit = (k @ mean)[..., 0] / math.sqrt(D) + ((k @ cov) * k).sum(-1) / (2 * D)  # (readers,Hkv,G,N)
        counts = p.valid & ~p.sinks(self.sink)
        share = logit.masked_fill(~counts[:, :, None], -torch.inf).softmax(-1).mean(2).sum(0, keepdim=True)
        return ((share + self.epsilon) * p.v.float().norm(dim=-1)).masked_fill(p.sinks(self.sink), torch.inf)
