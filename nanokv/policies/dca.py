"""Everything stays, and positions repeat, so that no distance is longer than what the model was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanokv.cache.budget import Workload
from nanokv.policies.full import Full


@dataclass(frozen=True, kw_only=True)
class DualChunk(Full):
    """Dual Chunk Attention (An et al. 2024, arXiv:2402.17463, §3). The text is cut into chunks of 5/8 of the model's
    context. For each chunk of keys a query takes another position, counted from the chunk's beginning:

        its own chunk       the true one
        the chunk before    the true one, but at most 3/4 of the context
        an earlier chunk    3/4 of the context

    Keys stay rotated to their absolute positions; the query is rotated for each chunk, which gives the same distances.
    Deviation: the softmax has its usual scale, where the authors' code has YaRN's factor (the paper does not).

    context  tokens that the model was trained on; by default what its config.json says
    """

    context: int | None = None
    positions_by_chunk = True
    keeps_prefix = False  # what follows a shared prefix would have to know where its chunks begin

    def __post_init__(self):
        if self.context is not None and self.context < 8:
            raise ValueError(f"dca:context={self.context}; give 8 tokens or more")

    @property
    def chunk_size(self) -> int:
        """In tokens, of a fitted policy."""
        return self._most - self.context // 8

    @property
    def _most(self) -> int:
        """The longest distance from the beginning of another chunk."""
        return 3 * self.context // 4

    def fit(self, work: Workload) -> DualChunk:
        if work.has_windows:
            raise ValueError(
                "dca gives keys new positions, and this model's sliding window counts the true ones; use full"
            )
        if self.context and self.context > work.context:
            raise ValueError(f"dca:context={self.context} is more than this model's {work.context}; leave it out")
        return self if self.context else replace(self, context=work.context)

    def shift(self, pos: Tensor, first: int) -> Tensor:
        behind, chunks = pos - first, pos // self.chunk_size - first // self.chunk_size
        placed = torch.where(chunks > 1, self._most, behind.clamp(max=self._most))
        return torch.where(chunks > 0, placed, behind) - behind
