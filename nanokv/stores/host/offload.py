"""The whole cache in the host's memory; each layer's comes over while the one before it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context, Store, StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.host.base import Hosted, HostStore


@dataclass(frozen=True, kw_only=True)
class Offload(Hosted):
    """Offloading by layers (FlexGen, Sheng et al. 2023, arXiv:2303.06865, §4.1): two layers' slots are on the device at a time, of the one
    that computes and of the next, which are copied meanwhile. Exact: the tokens are those of the same plan without it.

    Deviation: nothing but the cache is offloaded, and attention is never computed on the host. On a CPU host and device are the same
    memory, so the slots are read where they lie.
    """

    def pack(self, store: StoreSpec, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> OffloadStore:
        return OffloadStore(rows, policy, room, ctx, ("k", "v"))

    def host_bytes(self, config: Any, dtype: torch.dtype, slots: int) -> int:
        return slots * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def link(self, stores: Sequence[Store]) -> None:
        desk = Desk(max(plane.numel() for store in stores for (plane,) in store.planes))
        for i, store in enumerate(stores):
            store.desk, store.turn, store.then = desk, i % 2, stores[(i + 1) % len(stores)]


class Desk:
    """Room on the device for two layers, and the stream that fills it."""

    def __init__(self, size: int):
        self.size = size  # numbers in the largest layer's K or V
        self.stream: torch.cuda.Stream | None = None
        self.holds: list[OffloadStore | None] = [None, None]  # whose slots lie in each half …
        self.ready: list[Any] = [None, None]  # … once this event has passed
        self.room: dict[tuple[int, str], Tensor] = {}


class OffloadStore(HostStore):
    desk: Desk
    turn: int  # which half is this layer's
    then: OffloadStore  # the next one

    def stage(self) -> None:
        """Begin to bring this layer over, behind all that was asked to compute with the same half before."""
        desk, n = self.desk, self.slots.bound
        desk.stream = desk.stream or torch.cuda.Stream(self.ctx.device)
        desk.holds[self.turn] = self
        desk.stream.wait_stream(torch.cuda.current_stream(self.ctx.device))
        with torch.cuda.stream(desk.stream):
            for mine, (plane,) in zip(self.there(), self.planes, strict=True):
                mine[:, :, :n].copy_(plane[:, :, :n], non_blocking=True)
            desk.ready[self.turn] = desk.stream.record_event()

    def there(self) -> list[Tensor]:
        """K and V on the device."""
        found = []
        for name, (plane,) in zip("kv", self.planes, strict=True):
            room, key = self.desk.room, (self.turn, name)
            if key not in room:
                room[key] = self.ctx.empty(self.desk.size).zero_()
            found.append(room[key][: plane.numel()].view(plane.shape))
        return found

    def come(self) -> list[Tensor]:
        """K and V on the device, whole."""
        if self.desk.holds[self.turn] is not self:
            self.stage()
        torch.cuda.current_stream(self.ctx.device).wait_event(self.desk.ready[self.turn])
        return self.there()

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        if not self.waits:
            return super().append(k, v, pos)
        at, there = self.policy.slot(self.slots, pos), self.come()
        row = self.slots.flat(at)
        self._write(at, k, v)
        for mine, x in zip(there, (k, v), strict=True):
            mine.view(-1, x.shape[3]).index_copy_(0, row, x.reshape(-1, x.shape[3]))
        return self.slots.place(row, pos)

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.waits:
            return super().read(q, pos, near)
        there, home, early = self.come(), self.planes, self.then.turn != self.turn
        if early:
            self.then.stage()
        self.planes = [[x] for x in there]
        try:
            return super().read(q, pos, near)
        finally:
            self.planes = home
            if not early and self.then is not self:  # the same half: only behind this layer's reading
                self.then.stage()

    def refill(self, rows: list[Kept], room: int) -> bool:
        if self.desk.stream is not None:
            self.desk.stream.synchronize()  # it may still be reading what is overwritten now
        if self.desk.holds[self.turn] is self:
            self.desk.holds[self.turn] = None
        return super().refill(rows, room)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(self.there() if self.waits else [])]
