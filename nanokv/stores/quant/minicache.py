"""Two neighbouring layers hold one direction for each key and value together, and a length each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Store, StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.dense import SLOT_COUNTERS, SlotStore, plain_codecs
from nanokv.stores.quant.codec import Codec, CodeState


@dataclass(frozen=True, kw_only=True)
class MiniCache(StoreSpec):
    """MiniCache (Liu et al. 2024, arXiv:2405.14366, §4): from the middle layer on, each two layers keep one direction for a
    token's key, the spherical interpolation of theirs, one for its value, and the length that each vector had. The
    tokens of the prompt whose keys point furthest apart keep the keys and values of both layers.

    Deviations: those are the share `retain` of largest angle, where in the paper a threshold between the smallest and
    the largest angle selects them; their values are retained too; tokens that follow the prompt are always merged. A saved
    cache holds the directions of both layers.

    start   the first of the merged layers, as a share of the model's layers
    t       place between the two directions: 0 is the lower layer's, 1 the upper layer's
    retain  share of the prompt's tokens that are not merged
    """

    start: float = 0.5
    t: float = 0.6
    retain: float = 0.05
    state_type = CodeState
    merges_layers = True

    def __post_init__(self):
        if not (0 <= self.start <= 1 and 0 <= self.t <= 1 and 0 <= self.retain <= 1):
            raise ValueError(f"start={self.start},t={self.t},retain={self.retain}; each is a share from 0 to 1")

    def incompatible_policy(self, policy: Policy) -> str:
        if not policy.keeps_prefix:
            return "may keep other tokens in one layer than in the next, and here two layers merge theirs"
        return super().incompatible_policy(policy)

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        n = config.num_hidden_layers
        merged = 2 * ((n - math.ceil(self.start * n)) // 2) / n  # share of the layers
        both = 2 * config.head_dim * dtype.itemsize  # K and V
        per_head = both * (1 - merged / 2) + merged * (8 + self.retain * both) + 4  # a length is fp32, a position int32
        return config.num_key_value_heads * per_head, config.num_key_value_heads * SLOT_COUNTERS

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> PairStore:
        n = ctx.config.num_hidden_layers
        above = ctx.layer - math.ceil(self.start * n)
        is_merged = above >= 0 and ctx.layer - above % 2 + 1 < n
        return PairStore(rows, policy, room, ctx, self, above % 2 == 1 if is_merged else None)

    def link(self, stores: Sequence[Store]) -> None:
        for lower, upper in pairwise(stores):
            if lower.is_upper is False and upper.is_upper and lower.slots.pos.shape == upper.slots.pos.shape:
                upper.join(lower)


class PairCodec(Codec):
    """Planes: a vector, and the number that it is multiplied by. A layer that is merged with no other yet holds its own
    vectors and ones. The number −1 − r names the vector r of the table, which is retained.
    """

    rounds = makes_tensors = True

    def __init__(self, ctx: Context, table: Tensor | None = None):
        self.dim, self.table = ctx.config.head_dim, table
        self.plane_types = [(self.dim, ctx.dtype), (1, torch.float32)]

    def of_row(self, b: int) -> PairCodec:
        return self  # encoding a row needs no table

    def encode(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        return x, torch.ones_like(x[..., :1], dtype=torch.float32)

    def decode(self, planes: Sequence[Tensor], pos: Tensor, dtype: torch.dtype) -> Tensor:
        vector, number = planes
        x = (vector * number).to(dtype)
        if self.table is None or not self.table.shape[2]:
            return x
        nth = torch.where(number < 0, -1 - number, 0).long().expand_as(x)
        return torch.where(number < 0, self.table.unflatten(2, (-1, self.dim)).gather(2, nth).to(dtype), x)


class PairStore(SlotStore):
    """The slots of one layer. `below` is the lower layer of a pair, on the upper one's side; both then have the same
    tensor of directions.
    """

    below: PairStore | None = None

    def __init__(
        self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec: MiniCache, is_upper: bool | None
    ):
        """is_upper: of the two layers that are merged; None: this layer is merged with no other."""
        self.spec, self.is_upper = spec, is_upper
        state = rows[0].state
        self.is_merged = is_upper is not None and state is not None and state.tables[0] is not None
        codecs = plain_codecs(ctx)
        if self.is_merged:
            for row in rows:
                _check(row.state)
        if is_upper is not None:
            codecs = tuple(PairCodec(ctx, _tables(rows, i) if self.is_merged else None) for i in range(2))
        super().__init__(rows, policy, room, ctx, codecs)

    def join(self, lower: PairStore) -> None:
        """Merge what both layers hold, if it is not merged yet, and hold it in one tensor."""
        self.below = lower
        if not self.is_merged and not lower.is_merged:
            self._merge_all(lower)
        self.is_merged = lower.is_merged = True
        for mine, theirs in zip(self.planes, lower.planes, strict=True):
            mine[0] = theirs[0]

    def _merge_all(self, lower: PairStore) -> None:
        held = self.slots.pos >= 0  # (B,Hkv,S)
        n_retained = (self.spec.retain * held.sum(-1, keepdim=True)).ceil().int()
        most = int(n_retained.max())
        at = None
        for i in range(2):
            (below, below_number), (mine, my_number) = lower.planes[i], self.planes[i]
            direction, *lengths, angle = slerp(below, mine, self.spec.t)
            if at is None:  # K's angles decide for V too
                at = angle.masked_fill(~held, -1).topk(most, -1).indices[..., None]  # (B,Hkv,most,1)
            for store, vector, number, length in (
                (lower, below, below_number, lengths[0]),
                (self, mine, my_number, lengths[1]),
            ):
                nth = torch.arange(most, device=at.device).view(1, 1, -1, 1)
                marks = torch.where(nth < n_retained[..., None], -1.0 - nth, length.gather(2, at))
                number.copy_(length.scatter(2, at, marks))
                store.codecs[i].table = vector.gather(2, at.expand(-1, -1, -1, vector.shape[3])).flatten(2)
            below.copy_(direction)

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        if self.below is None:
            super().append(k, v, pos)
        else:
            self.append_by_index(k, v, pos)

    def write_at(self, index: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if self.below is None:
            return super().write_at(index, k, v, pos)
        merged = []
        for x, (vector, _) in zip((k, v), self.below.planes, strict=True):
            below = vector.view(-1, x.shape[3]).index_select(0, index.flatten()).view(x.shape)
            merged.append(slerp(below, x, self.spec.t)[:3])
        (direction_k, below_k, mine_k), (direction_v, below_v, mine_v) = merged
        (vector_k, number_k), (vector_v, number_v) = self.below.planes
        append = self.ctx.ops.append
        append(direction_k.to(k.dtype), direction_v.to(v.dtype), index, vector_k, vector_v)
        append(below_k, below_v, index, number_k, number_v)
        append(mine_k, mine_v, index, self.planes[0][1], self.planes[1][1])
        return (direction_k, mine_k), (direction_v, mine_v)

    def used_bytes(self) -> tuple[int, int, int]:
        k, v, bookkeeping = super().used_bytes()
        shared = 0  # the lower layer counts the directions
        if self.below is not None:
            shared = int(self.slots.length.sum()) * self.ctx.config.head_dim * self.ctx.dtype.itemsize
        return k - shared, v - shared, bookkeeping


def _check(state: CodeState) -> None:
    """ValueError unless each number is a length or names a vector of the table. A file may say anything."""
    for (vector, number), table in zip(state.codes, state.tables, strict=True):
        n = 0 if table is None else table.shape[2] // vector.shape[3]
        if not (number >= -n).all():
            raise ValueError("it names retained tokens that it does not hold")


def _tables(rows: Sequence[Kept], i: int) -> Tensor:
    """(B,Hkv,W): the retained vectors of K (i = 0) or V (1) that the rows' states hold."""
    tables = [row.state.tables[i] for row in rows]
    if any(x is None for x in tables):
        raise ValueError("the retained tokens are missing")
    width = max(x.shape[2] for x in tables)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[2])) for x in tables])


def slerp(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The direction (…,D) at the place t between the directions of a and b (…,D), their lengths (…,1), and the angle
    between them in radians (…); all fp32.
    """
    a, b = a.float(), b.float()
    one, two = normalize(a, dim=-1), normalize(b, dim=-1)
    angle = (one * two).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    is_small = sine < 1e-4  # the weights then are 0 over 0; a straight line is as good
    first = torch.where(is_small, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(is_small, t, (t * angle).sin() / sine)
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    return normalize(first * one + second * two, dim=-1), *lengths, angle[..., 0]
