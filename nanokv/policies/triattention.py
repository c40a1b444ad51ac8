"""Tokens stay whose keys the mean query will attend to at distances up to very large ones; for long answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest, pair_norms
from nanokv.model.rope import angles, rotate
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class TriAttention(Scorer):
    """TriAttention (Mao et al. 2026, arXiv:2604.04921): a key is scored without any of the latest queries. Seen as complex
    numbers, one for each pair of channels that the rotation turns together, its score by a query head is the sum of
    two. The first is the product with the head's mean query before rotation, rotated to 1, 2, 4, … `far` positions
    ahead, and averaged over these. The second is Σ (E|q| − |E q|)·|k| over the pairs: what queries that differ from their
    mean would find. Each head's scores are standardised over the tokens, and of the heads of a KV head the largest
    counts. What is held is scored again every `every` tokens.

    The authors take E q and E|q| once from a text of its own. Here they are those of the prompt's queries, and at a
    rescore those of the last 128 ones. Each KV head of each layer chooses by itself, as in the released code's option of
    that name.

    recent  last tokens that always stay
    far     the largest distance ahead
    """

    budget: int | str = 2048
    every: int = 128
    recent: int = 128
    far: int = 65536

    def __post_init__(self):
        if self.recent < 0 or self.far < 1:
            raise ValueError(f"triattention:recent={self.recent},far={self.far} is out of range; recent ≥ 0, far ≥ 1")
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(query_moments=0)

    @property
    def min_budget(self) -> int:
        return max(1, self.recent)

    def score(self, p: Prompt) -> Tensor:
        ahead = p.seen + 2 ** torch.arange(self.far.bit_length(), device=p.k.device)[None]
        cos, sin = (x.mean(1)[0, 0] for x in angles(p.inv_freq, ahead))  # (D,) each
        k, heads = p.k.float(), p.k.shape[1]
        mean = rotate(p.q_mean, (cos, sin)).unflatten(1, (heads, -1))  # (readers,Hkv,G,D)
        differ = (p.q_abs - pair_norms(p.q_mean)).unflatten(1, (heads, -1))  # (readers,Hkv,G,D/2)
        score = mean @ k.mT + differ @ pair_norms(k).mT  # (readers,Hkv,G,N)
        score = standardised(score, p.valid[:, :, None])
        return score.amax(2).mean(0, keepdim=True).masked_fill(p.recent(self.recent), torch.inf)


def standardised(x: Tensor, valid: Tensor) -> Tensor:
    """x with mean 0 and standard deviation 1 along the last dimension, where valid; 0 elsewhere."""
    n = valid.sum(-1, keepdim=True)
    x = (x - (x * valid).sum(-1, keepdim=True) / n) * valid
    return x / (x.square().sum(-1, keepdim=True) / n).sqrt().clamp(min=1e-6)
