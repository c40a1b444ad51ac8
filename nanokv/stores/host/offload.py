"""The whole cache in the host's memory; each layer's slots are copied to the device while the layer before it
computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Store
from nanokv.policies.base import Policy
from nanokv.stores.host.base import Hosted, HostStore


@dataclass(frozen=True, kw_only=True)
class Offload(Hosted):
    """Offloading by layers (FlexGen, Sheng et al. 2023, arXiv:2303.06865, §4.1): the device holds the slots of two
    layers at a time, of the one that computes and of the next, which is copied meanwhile. Exact: it holds the same
    tokens as the plan without it.

    Deviation: only the cache is offloaded, and attention is never computed on the host. On a CPU the host's memory is
    the device's, so slots are read where they lie.
    """

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> OffloadStore:
        return OffloadStore(rows, policy, room, ctx, self)

    def link(self, stores: Sequence[Store]) -> None:
        staging = StagingBuffer(max(plane.numel() for store in stores for (plane,) in store.planes))
        for i, store in enumerate(stores):
            store.staging, store.half, store.next_layer = staging, i % 2, stores[(i + 1) % len(stores)]


class StagingBuffer:
    """Memory on the device for the slots of two layers, in two halves, and the stream that fills it."""

    def __init__(self, size: int):
        self.size = size  # numbers in the largest layer's K or V
        self.stream: torch.cuda.Stream | None = None
        self.owner: list[OffloadStore | None] = [None, None]  # whose slots each half holds
        self.event: list[torch.cuda.Event | None] = [None, None]  # passes when the copy into that half is done
        self.memory: dict[tuple[int, str], Tensor] = {}


class OffloadStore(HostStore):
    staging: StagingBuffer
    half: int  # the half of the staging buffer that this layer uses
    next_layer: OffloadStore

    @property
    def needs_host_sync(self) -> bool:
        return self.host_is_apart  # its copies run on a stream of their own, which no graph captures

    def prefetch(self) -> None:
        """Start to copy this layer's slots to the device, after all work that has been queued so far."""
        staging = self.staging
        staging.stream = staging.stream or torch.cuda.Stream(self.ctx.device)
        staging.owner[self.half] = self
        staging.stream.wait_stream(torch.cuda.current_stream(self.ctx.device))
        with torch.cuda.stream(staging.stream):
            # whole planes: contiguous memory on both sides is copied at the speed of the link, without the host
            for mine, (plane,) in zip(self.staged(), self.planes, strict=True):
                mine.copy_(plane, non_blocking=True)
            staging.event[self.half] = staging.stream.record_event()

    def staged(self) -> list[Tensor]:
        """This layer's K and V in the staging buffer."""
        found, memory = [], self.staging.memory
        for name, (plane,) in zip("kv", self.planes, strict=True):
            key = self.half, name
            if key not in memory:
                memory[key] = self.ctx.empty(self.staging.size).zero_()
            found.append(memory[key][: plane.numel()].view(plane.shape))
        return found

    def wait(self) -> list[Tensor]:
        """This layer's K and V on the device, complete."""
        if self.staging.owner[self.half] is not self:
            self.prefetch()
        torch.cuda.current_stream(self.ctx.device).wait_event(self.staging.event[self.half])
        return self.staged()

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        if not self.host_is_apart:
            super().append(k, v, pos)
            return
        staged = self.wait()
        self.ctx.ops.append(k, v, self.append_by_index(k, v, pos), *staged)

    def _planes_to_read(self, q: Tensor) -> list[list[Tensor]]:
        if not self.host_is_apart:
            return self.planes
        staged = self.wait()
        if self.next_layer.half != self.half:
            self.next_layer.prefetch()
        return [[x] for x in staged]

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        found = super().read(q, pos, q_sink)
        shares_half = self.next_layer.half == self.half and self.next_layer is not self
        if self.host_is_apart and shares_half:  # the next layer's copy must come after this layer was read
            self.next_layer.prefetch()
        return found

    def refill(self, rows: list[Kept], room: int) -> bool:
        if self.staging.stream is not None:
            self.staging.stream.synchronize()  # it may still read what is overwritten now
        if self.staging.owner[self.half] is self:
            self.staging.owner[self.half] = None
        return super().refill(rows, room)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(self.staged() if self.host_is_apart else [])]
