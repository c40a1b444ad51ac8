"""Kept tokens as they are, in the compute dtype: K and V in static slots (B,Hkv,S,D). Lossless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.contract import Ask, Context, Kept, Policy, StoreSpec
from nanokv.ops import merge
from nanokv.slots import Slots


@dataclass(frozen=True, kw_only=True)
class Dense(StoreSpec):
    """K and V unquantised (the layout every engine has; no paper)."""

    def bits(self, dtype: torch.dtype) -> tuple[float, float]:
        return dtype.itemsize * 8, dtype.itemsize * 8

    def cost(self, config: Any, dtype: torch.dtype) -> tuple[float, int]:
        per_head = 2 * config.head_dim * dtype.itemsize + 4  # K, V and an int32 position
        return config.num_key_value_heads * per_head, config.num_key_value_heads * (4 * 4 + 8)  # Slots' bookkeeping

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> DenseStore:
        return DenseStore(rows, policy, room, ctx)


class DenseStore:
    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context):
        self.slots, self.policy, self.ctx = Slots(rows, room, ctx.config.sliding_window), policy, ctx
        self.default_rule = type(policy).slot is Policy.slot
        n, heads, dim = len(rows), ctx.config.num_key_value_heads, ctx.config.head_dim
        self.k = ctx.empty(n, heads, self.slots.capacity, dim)  # (B,Hkv,S,D)
        self.v = ctx.empty(n, heads, self.slots.capacity, dim)
        self._fill(rows)

    def _fill(self, rows: list[Kept]) -> None:
        for b, r in enumerate(rows):
            n = r.k.shape[2]
            self.k[b, :, :n], self.v[b, :, :n] = r.k[0], r.v[0]
            self.k[b, :, n:], self.v[b, :, n:] = 0, 0  # a masked slot must still be a number: 0 · NaN is NaN

    def refill(self, rows: list[Kept], room: int) -> bool:
        if not self.slots.refill(rows, room):
            return False
        self._fill(rows)
        return True

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.slots
        if (
            s.even and self.default_rule and k.shape[2] == 1
        ):  # the host knows the slot: three copies, no index arithmetic
            at = s.host_ring()
            self.k[:, :, at : at + 1], self.v[:, :, at : at + 1] = k, v
            s.place_at(at, pos)
            return
        row = s.flat(
            self.policy.slot(s, pos)
        )  # torch scatters bf16 by copying the whole tensor; index_copy_ writes in place
        self.k.view(-1, k.shape[3]).index_copy_(0, row, k.reshape(-1, k.shape[3]))
        self.v.view(-1, v.shape[3]).index_copy_(0, row, v.reshape(-1, v.shape[3]))
        s.place(row, pos)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        step = self.slots.span  # in one piece no two tokens may want the same slot
        for a in range(0, k.shape[2], step):
            self.append(k[:, :, a : a + step], v[:, :, a : a + step], pos[:, a : a + step])

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        s, n = self.slots, self.slots.bound
        length = None if s.even else s.length
        if near is None:
            return self._decode(q, pos, slice(0, n), length, self.policy.watches)
        m = min(s.protected, n)
        parts = [self._decode(near, pos, slice(0, m), None if length is None else length.clamp(max=m))[:2]]
        if n > m:
            behind = None if length is None else (length - m).clamp(min=0)
            parts.append(self._decode(q, pos, slice(m, n), behind)[:2])
        return *merge(parts), None

    def _decode(
        self, q: Tensor, pos: Tensor, part: slice, length: Tensor | None, watches: Ask | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, kpos = self.k[:, :, part], self.v[:, :, part], self.slots.pos[:, :, part]
        window, ops = self.ctx.config.sliding_window, self.ctx.ops
        if watches is None or q.shape[2] > 1:
            return ops.decode(q, k, v, length, kpos, pos, window)
        return ops.decode(q, k, v, length, kpos, pos, window, watches.group, watches.noises(0))

    def maintain(self, written: int) -> None:
        """Nothing to do: slots are written in place."""

    def unpack(self) -> list[Kept]:
        return self.slots.unpack(self.k.view(-1, self.k.shape[-1]), self.v.view(-1, self.v.shape[-1]))

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, *self.slots.tensors()]

    def live_bytes(self) -> int:
        spare = self.slots.total - int(self.slots.length.sum())
        votes = 0 if self.slots.flat_votes is None else 4
        per_slot = 2 * self.k.shape[-1] * self.k.itemsize + 4 + votes
        return sum(t.nbytes for t in self.tensors()) - spare * per_slot
