"""Keys that differ from the rest stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from nanokv.cache.kept import Prompt
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Scorer):
    """KeyDiff (Park et al. 2025, arXiv:2504.15364, §3): the keys least similar to the mean direction of all keys of
    the head stay; no query is used. Deviation: the prompt is scored as a whole, where the paper goes through it in
    blocks.
    """

    def score(self, p: Prompt) -> Tensor:
        k = p.k.float() * p.valid[..., None]
        anchor = normalize(k, dim=-1).sum(2, keepdim=True)  # the mean's length does not matter
        return -cosine_similarity(k, anchor, dim=-1)
