"""Keys as factors of low rank and values on the host; a step rebuilds and fetches only the chunks that its query
needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.model.rope import unrotated
from nanokv.policies.base import Policy
from nanokv.stores.sparse.chunks import Chunked, ChunkStore

V_GROUP = 32  # channels of a 4-bit value that share a scale


@dataclass(frozen=True, kw_only=True)
class Shadow(Chunked):
    """ShadowKV (Sun et al. 2024, arXiv:2410.21465, Algorithms 1 and 2): before rotation keys have low rank, jointly
    over heads, so K ≈ A·B with one row of A per token; V goes to the host. A chunk's landmark is the mean of its
    rotated keys. Each query head takes the softmax over all landmarks, and a chunk's score is the largest weight that
    a query head of the KV head gives it. A step rebuilds the keys of the best chunks, rotates them to their positions
    and fetches their values. These stay exact: the `outliers` chunks that hold the tokens least similar to their
    landmark, the last `local` chunks, and generated tokens until `grow` makes chunks of them.

    Deviations from the authors' code: A and B come from the Gram
    matrix's eigenvectors, not from an SVD of all tokens; a prompt too short to choose from stays exact (theirs fails
    below 4,096 tokens); `budget` is a percentage of the prompt as in the paper's tables; a turn of several tokens
    reads every chunk; any head size, group and batch works.

    rank      of the factors of K; none: 160 for 1,024 channels, relatively more for fewer (docs/benchmarks.md)
    outliers  chunks that stay exact
    values    where V is: host, device, or int4 (rounded, on the device)
    """

    rank: int | None = None
    outliers: int = 48
    values: str = "host"
    kernels = ("fetch_chunks", "landmark_scores", "quantize", "rebuild_keys")
    rank_dim: ClassVar = {"a": 2, "b": 1}
    chunk_dim: ClassVar = {"a": 0, "landmarks": 1, "v": 1, "words": 1, "scale": 1, "zero": 1, "chunk_ids": 1}

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

    def incompatible_model(self, config: Any) -> str:
        if self.values == "int4" and config.head_dim % 4:
            return f"four codes share a word, and 4 does not divide the head dimension {config.head_dim}; use values=device"
        return super().incompatible_model(config)

    def n_outliers(self, n_chunks: int) -> int:
        return min(self.outliers, n_chunks)

    @property
    def on_host(self) -> tuple[str, ...]:
        return ("v",) if self.values == "host" else ()

    def rank_of(self, width: int, n: int) -> int:
        """The rank for n tokens whose heads have `width` channels together."""
        rank = self.rank or max(width * 5 // 32, min(160, width // 2))
        return min(rank, width, n)

    def v_group(self, dim: int) -> int:
        """How many channels of a 4-bit value share a scale."""
        return V_GROUP if dim % V_GROUP == 0 else dim

    def chunk_bytes(self, config: Any, itemsize: int, chunks: int, candidates: int, n: int) -> int:
        heads, dim = config.num_key_value_heads, config.head_dim
        rank, tokens = self.rank_of(heads * dim, n), chunks * self.chunk
        values = {"host": 0, "device": dim * itemsize, "int4": dim // 2 + 4 * (dim // self.v_group(dim))}[self.values]
        return (tokens * rank + heads * dim * (rank + candidates)) * itemsize + tokens * heads * values

    def outlier_chunks(self, kept: Kept, chunks: int) -> Tensor:
        keys = self._chunks(kept.k, chunks).float()
        similarity = torch.cosine_similarity(keys, keys.mean(2, keepdim=True), -1).amin(2)  # (Hkv,C)
        return similarity.topk(self.n_outliers(chunks), largest=False).indices.sort(-1).values

    def build(
        self, kept: Kept, chunks: int, candidates: Tensor, prompt_data: Mapping[str, Tensor] | None, ctx: Context
    ) -> dict[str, Tensor]:
        raw, made = unrotated(kept.k, kept.pos[:, 0], ctx.inv_freq), {}
        if prompt_data is None:
            a, made["b"] = factors(raw, self.rank_of(kept.k.shape[1] * kept.k.shape[3], kept.k.shape[2]))
        else:  # in the prompt's basis (the paper's appendix A.1)
            a = raw[0].transpose(0, 1).flatten(1) @ prompt_data["b"].float().transpose(0, 1).flatten(1).T
        landmarks = self._chunks(kept.k, chunks).float().mean(2)
        landmarks = landmarks.gather(1, candidates[..., None].expand(-1, -1, landmarks.shape[2]))
        values = self._chunks(kept.v, chunks)  # (Hkv,C,chunk,D)
        made |= {"a": a[: chunks * self.chunk].unflatten(0, (chunks, -1)), "landmarks": landmarks}
        made = {name: x.to(ctx.dtype) for name, x in made.items()}
        if self.values != "int4":
            return made | {"v": values.flatten(2)}
        parts = ctx.ops.quantize(values.flatten(1, 2), 4, 1, self.v_group(values.shape[3]))
        parts = (x.unflatten(1, (chunks, -1)).flatten(2) for x in parts)
        return made | dict(zip(("words", "scale", "zero"), parts, strict=True))

    def _chunks(self, x: Tensor, chunks: int) -> Tensor:
        """(1,Hkv,N,D) → (Hkv,C,chunk,D)."""
        return x[0, :, : chunks * self.chunk].unflatten(1, (chunks, -1))

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> ShadowStore:
        return ShadowStore(rows, policy, room, ctx, self)


class ShadowStore(ChunkStore):
    k_names, v_names = ("a", "b"), ("v", "words", "scale", "zero")

    def score(self, q: Tensor, visible: Tensor | None) -> Tensor:
        return self.ctx.ops.landmark_scores(q, self.chunk_data["landmarks"], visible)

    def gather(self, chunk_ids: Tensor, is_new: Tensor | None, keys: Tensor, values: Tensor) -> None:
        data, ops = self.chunk_data, self.ctx.ops
        ops.rebuild_keys(data["a"], data["b"], self.ctx.inv_freq, data["first_pos"], chunk_ids, is_new, keys)
        if "v" in data:
            ops.fetch_chunks(data["v"], chunk_ids, is_new, values)
            return
        parts = []
        for name in (
            "words",
            "scale",
            "zero",
        ):  # they are on the device: skipping those that are not new would gain nothing
            parts.append(data[name].new_empty(*chunk_ids.shape, data[name].shape[3]))
            ops.fetch_chunks(data[name], chunk_ids, None, parts[-1])
        words, scale, zero = (x.unflatten(3, (self.spec.chunk, -1)) for x in parts)
        values.copy_(ops.dequantize(words, scale, zero, 4).flatten(3))


def factors(k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Keys before rotation (1,Hkv,N,D) fp32 → A (N,rank), B (Hkv,rank,D): the best K ≈ A·B of that rank over all
    heads side by side.

    The eigenvectors of KᵀK span the same space as the SVD's; that matrix has the size of the channels instead of the
    text, and later tokens need only k·Bᵀ.
    """
    flat = k[0].transpose(0, 1).flatten(1)  # (N,Hkv·D)
    _, vectors = torch.linalg.eigh(flat.T @ flat)  # ascending
    basis = vectors[:, -rank:].flip(1)
    return flat @ basis, basis.T.unflatten(1, (k.shape[1], -1)).transpose(0, 1).contiguous()
