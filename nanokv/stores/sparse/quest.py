"""Everything stays exact and on the device; a step reads the chunks that its query can score highest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.policies.base import Policy
from nanokv.stores.sparse.chunks import Chunked, ChunkStore


@dataclass(frozen=True, kw_only=True)
class Quest(Chunked):
    """Quest (Tang et al. 2024, arXiv:2406.10774, §3.3): each page of 16 tokens has the smallest and the largest value
    of every key channel. A page's score is Σ max(q·smallest, q·largest), which the logit of no key in it exceeds; a
    step reads the pages of highest score.

    It saves reading, not memory. Deviations from the authors' code: the query heads of a KV head read the same pages,
    by the mean of their bounds; the first two layers choose pages too, where theirs read everything; the prompt's
    last page is always read, and so are generated tokens until `grow` makes pages of them.
    """

    chunk: int = 16
    local: int = 1
    chunk_dim: ClassVar = {"k": 1, "v": 1, "bounds": 1, "chunk_ids": 1}

    def outlier_chunks(self, kept: Kept, chunks: int) -> Tensor:
        return torch.zeros(kept.k.shape[1], 0, dtype=torch.int64, device=kept.k.device)

    def build(
        self, kept: Kept, chunks: int, candidates: Tensor, prompt_data: Mapping[str, Tensor] | None, ctx: Context
    ) -> dict[str, Tensor]:
        k, v = (x[0, :, : chunks * self.chunk].unflatten(1, (chunks, -1)) for x in (kept.k, kept.v))
        return {"k": k.flatten(2), "v": v.flatten(2), "bounds": torch.cat((k.amax(2), k.amin(2)), -1)}

    def chunk_bytes(self, config: Any, itemsize: int, chunks: int, candidates: int, n: int) -> int:
        return 2 * config.num_key_value_heads * config.head_dim * itemsize * (chunks * self.chunk + candidates)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> QuestStore:
        return QuestStore(rows, policy, room, ctx, self)


class QuestStore(ChunkStore):
    k_names, v_names = ("k",), ("v",)

    def score(self, q: Tensor, visible: Tensor | None) -> Tensor:
        """A positive channel of q multiplies the largest key value, a negative one the smallest: one product of twice
        the width.
        """
        bounds = self.chunk_data["bounds"]
        q = q.unflatten(1, (bounds.shape[1], -1))[:, :, :, 0].float()
        both = torch.cat((q.clamp(min=0), q.clamp(max=0)), -1)
        return (both @ bounds.float().transpose(2, 3)).mean(2)

    def gather(self, chunk_ids: Tensor, is_new: Tensor | None, keys: Tensor, values: Tensor) -> None:
        self.ctx.ops.fetch_chunks(self.chunk_data["k"], chunk_ids, is_new, keys)
        self.ctx.ops.fetch_chunks(self.chunk_data["v"], chunk_ids, is_new, values)
