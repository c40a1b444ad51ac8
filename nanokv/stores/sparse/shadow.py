"""Keys as factors of low rank, values on the host, and of both only what a query asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context
from nanokv.policies.base import Policy
from nanokv.stores.sparse.chunks import Chunked, ChunkStore

RUN = 32  # channels of a value in 4 bits that share a scale


@dataclass(frozen=True, kw_only=True)
class Shadow(Chunked):
    """ShadowKV (Sun et al. 2024, arXiv:2410.21465, Algorithms 1 and 2): before their rotation keys have low rank, jointly over heads, so
    K ≈ A·B with a row of A per token; V goes to the host. A step scores the mean rotated key of each chunk (its landmark), by
    softmax per query head and the greatest of a KV head's, rebuilds the keys of the best chunks, rotates them to their places and
    fetches their values. The `outliers` chunks least like their landmark, the last `local` chunks and what is generated stay exact.

    rank: of K; none: 160 of 1,024 channels, and more where there are few (results/ranks.json). values: host | device | int4, the last two
    on the device. Deviations from the authors' code: A and B by the Gram matrix's eigenvectors, not an SVD of all tokens; a prompt
    too short to choose from stays exact (theirs fails below 4,096 tokens); `budget` is a share of the prompt as in the paper's tables;
    a turn of several tokens reads every chunk; any head size, group, batch and number of new tokens.
    """

    rank: int | None = None
    outliers: int = 48
    values: str = "host"
    along: ClassVar = {"a": 0, "marks": 1, "v": 1, "words": 1, "scale": 1, "zero": 1, "land": 1}

    def __post_init__(self):
        super().__post_init__()
        if (
            self.values not in ("host", "device", "int4")
            or self.outliers < 0
            or (self.rank is not None and self.rank < 1)
        ):
            raise ValueError(
                f"rank={self.rank},outliers={self.outliers},values={self.values}; rank at least 1, outliers at least 0, "
                "values host, device or int4"
            )

    def misfit(self, config: Any) -> str:
        if self.values == "int4" and config.head_dim % 4:
            return f"four codes share a word, and {config.head_dim} channels are no fours; use values=device"
        return super().misfit(config)

    def spared(self, n_chunks: int) -> int:
        return min(self.outliers, n_chunks)

    @property
    def on_host(self) -> tuple[str, ...]:
        return ("v",) if self.values == "host" else ()

    def rank_of(self, width: int, n: int) -> int:
        """For n tokens whose heads have `width` channels together."""
        rank = self.rank or max(width * 5 // 32, min(160, width // 2))
        return min(rank, width, n)

    def run(self, dim: int) -> int:
        """Channels of a value that share a scale."""
        return RUN if dim % RUN == 0 else dim

    def body_bytes(self, config: Any, itemsize: int, chunks: int, free: int, n: int) -> int:
        heads, dim = config.num_key_value_heads, config.head_dim
        rank, tokens = self.rank_of(heads * dim, n), chunks * self.chunk
        values = {"host": 0, "device": dim * itemsize, "int4": dim // 2 + 4 * (dim // self.run(dim))}[self.values]
        return (tokens * rank + heads * dim * (rank + free)) * itemsize + tokens * heads * values

    def exact(self, kept: Kept, chunks: int) -> Tensor:
        keys = self._chunks(kept.k, chunks).float()
        alike = torch.cosine_similarity(keys, keys.mean(2, keepdim=True), -1).amin(2)  # (Hkv,C)
        return alike.topk(self.spared(chunks), largest=False).indices.sort(-1).values

    def build(
        self, kept: Kept, chunks: int, free: Tensor, body: dict[str, Tensor] | None, ctx: Context
    ) -> dict[str, Tensor]:
        raw, made = ctx.raw(kept.k, kept.pos), {}
        if body is None:
            a, made["b"] = factors(raw, self.rank_of(kept.k.shape[1] * kept.k.shape[3], kept.k.shape[2]))
        else:  # in the prompt's basis (the paper's appendix A.1)
            a = raw[0].transpose(0, 1).flatten(1) @ body["b"].float().transpose(0, 1).flatten(1).T
        marks = self._chunks(kept.k, chunks).float().mean(2)
        marks = marks.gather(1, free[..., None].expand(-1, -1, marks.shape[2]))
        values = self._chunks(kept.v, chunks)  # (Hkv,C,chunk,D)
        made |= {"a": a[: chunks * self.chunk].unflatten(0, (chunks, -1)), "marks": marks}
        made = {name: x.to(ctx.dtype) for name, x in made.items()}
        if self.values != "int4":
            return made | {"v": values.flatten(2)}
        parts = ctx.ops.quantize(values.flatten(1, 2), 4, 1, self.run(values.shape[3]))
        parts = (x.unflatten(1, (chunks, -1)).flatten(2) for x in parts)
        return made | dict(zip(("words", "scale", "zero"), parts, strict=True))

    def _chunks(self, x: Tensor, chunks: int) -> Tensor:
        """(1,Hkv,N,D) → (Hkv,C,chunk,D)."""
        return x[0, :, : chunks * self.chunk].unflatten(1, (chunks, -1))

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> ShadowStore:
        return ShadowStore(rows, policy, room, ctx, self)


class ShadowStore(ChunkStore):
    of_k, of_v = ("a", "b"), ("v", "words", "scale", "zero")

    def score(self, q: Tensor, seen: Tensor | None) -> Tensor:
        return self.ctx.ops.landmarks(q, self.body["marks"], seen)

    def fill(self, ids: Tensor, fresh: Tensor | None, keys: Tensor, values: Tensor) -> None:
        body, ops = self.body, self.ctx.ops
        ops.rebuild(body["a"], body["b"], self.ctx.inv_freq, body["first"], ids, fresh, keys)
        if "v" in body:
            ops.fetch(body["v"], ids, fresh, values)
            return
        parts = []
        for name in ("words", "scale", "zero"):  # on the device already: nothing is gained by leaving some out
            parts.append(body[name].new_empty(*ids.shape, body[name].shape[3]))
            ops.fetch(body[name], ids, None, parts[-1])
        words, scale, zero = (x.unflatten(3, (self.spec.chunk, -1)) for x in parts)
        values.copy_(ops.dequantize(words, scale, zero, 4).flatten(3))


def factors(k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Keys before rotation (1,Hkv,N,D) fp32 → A (N,rank), B (Hkv,rank,D): the best K ≈ A·B of that rank over all heads side by side.

    By the eigenvectors of KᵀK: the same plane as the SVD's for a matrix of the channels' size instead of the text's, and later tokens
    would need no more than k·Bᵀ.
    """
    flat = k[0].transpose(0, 1).flatten(1)  # (N,Hkv·D)
    _, vectors = torch.linalg.eigh(flat.T @ flat)  # ascending
    basis = vectors[:, -rank:].flip(1)
    return flat @ basis, basis.T.unflatten(1, (k.shape[1], -1)).transpose(0, 1).contiguous()
