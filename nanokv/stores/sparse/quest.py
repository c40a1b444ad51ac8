"""Everything exact and on the device, of which a step reads the pages whose bounds promise most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context
from nanokv.policies.base import Policy
from nanokv.stores.sparse.chunks import Chunked, ChunkStore


@dataclass(frozen=True, kw_only=True)
class Quest(Chunked):
    """Quest (Tang et al. 2024, arXiv:2406.10774, §3.3): of each page of 16 tokens the least and the greatest of every key channel; a page
    is worth Σ max(q·least, q·greatest), which no key in it exceeds, and a step reads the best pages.

    Saves reading, not memory. Deviations from the authors' code: the query heads of a KV head read the same pages, by the mean of
    their bounds; the first two layers choose as well; the prompt's last page and what is generated are always read.
    """

    chunk: int = 16
    local: int = 1
    along: ClassVar = {"k": 1, "v": 1, "bounds": 1, "land": 1}

    def exact(self, kept: Kept, chunks: int) -> Tensor:
        return torch.zeros(kept.k.shape[1], 0, dtype=torch.int64, device=kept.k.device)

    def build(
        self, kept: Kept, chunks: int, free: Tensor, body: dict[str, Tensor] | None, ctx: Context
    ) -> dict[str, Tensor]:
        k, v = (x[0, :, : chunks * self.chunk].unflatten(1, (chunks, -1)) for x in (kept.k, kept.v))
        return {"k": k.flatten(2), "v": v.flatten(2), "bounds": torch.cat((k.amax(2), k.amin(2)), -1)}

    def body_bytes(self, config: Any, itemsize: int, chunks: int, free: int, n: int) -> int:
        return 2 * config.num_key_value_heads * config.head_dim * itemsize * (chunks * self.chunk + free)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> QuestStore:
        return QuestStore(rows, policy, room, ctx, self)


class QuestStore(ChunkStore):
    of_k, of_v = ("k",), ("v",)

    def score(self, q: Tensor, seen: Tensor | None) -> Tensor:
        """A positive channel of q takes the greatest, a negative one the least: one product of twice the width."""
        bounds = self.body["bounds"]
        q = q.unflatten(1, (bounds.shape[1], -1))[:, :, :, 0].float()
        both = torch.cat((q.clamp(min=0), q.clamp(max=0)), -1)
        return (both @ bounds.float().transpose(2, 3)).mean(2)

    def fill(self, ids: Tensor, fresh: Tensor | None, keys: Tensor, values: Tensor) -> None:
        self.ctx.ops.fetch(self.body["k"], ids, fresh, keys)
        self.ctx.ops.fetch(self.body["v"], ids, fresh, values)
