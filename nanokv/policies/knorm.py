"""Keys of small norm receive much attention, so they stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Knorm(Scorer):
    """Knorm (Devoto et al. 2024, arXiv:2406.11430, §3): the keys with the smallest L2 norm stay; no query is used.

    Deviation: every layer is compressed; the paper leaves the first two uncompressed.
    """

    def score(self, p: Prompt) -> Tensor:
        return -p.k.float().norm(dim=-1)
