"""Kept tokens as they are, in the compute dtype: K and V in static slots (B,Hkv,S,D). Lossless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.contract import Context, Kept, Policy, Slots, StoreSpec


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
        for b, r in enumerate(rows):
            n = r.k.shape[2]
            self.k[b, :, :n], self.v[b, :, :n] = r.k[0], r.v[0]
            self.k[b, :, n:], self.v[b, :, n:] = 0, 0  # a masked slot must still be a number: 0 · NaN is NaN

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

    def read(self, q: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        s, n = self.slots, self.slots.bound
        group = self.policy.watches.group if self.policy.watches and q.shape[2] == 1 else None
        length = None if s.even else s.length
        window = self.ctx.config.sliding_window
        return self.ctx.ops.decode(q, self.k[:, :, :n], self.v[:, :, :n], length, s.pos[:, :, :n], pos, window, group)

    def maintain(self, written: int) -> None:
        """Nothing to do: slots are written in place."""

    def unpack(self) -> list[Kept]:
        s, rows = self.slots, []
        for b, n in enumerate(s.length):
            real = torch.arange(int(n.max()), device=n.device) < n[:, None]  # (Hkv,N)
            when = s.pos[b, :, : real.shape[1]].masked_fill(~real, torch.iinfo(torch.int32).max)
            at = when.argsort(-1)
            row = at[..., None].expand(*at.shape, self.k.shape[3])
            pos = s.pos[b].gather(1, at).masked_fill(~real, -1)
            votes = None if s.votes is None else s.votes[b].gather(1, at)[None]
            k, v = self.k[b].gather(1, row)[None], self.v[b].gather(1, row)[None]
            rows.append(Kept(k, v, pos[None], n[None].clone(), s.wanted[b : b + 1], s.sink[b : b + 1], votes=votes))
        return rows

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, *self.slots.tensors()]

    def live_bytes(self) -> int:
        spare = self.slots.pos.numel() - int(self.slots.length.sum())
        votes = 0 if self.slots.votes is None else 4
        per_slot = 2 * self.k.shape[3] * self.k.itemsize + 4 + votes
        return sum(t.nbytes for t in self.tensors()) - spare * per_slot
