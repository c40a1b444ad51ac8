"""Exact slots of which K, V or both lie in the host's memory. On a CPU that is the device's own memory: nothing is
moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.policies.base import Policy
from nanokv.stores.dense import Dense, SlotStore, plain_codecs


@dataclass(frozen=True, kw_only=True)
class Hosted(Dense):
    """`on_host` names what lies in the host's memory: k, v or both."""

    on_host = ("k", "v")
    implies = ("dense",)
    reads_by_chunk = False

    def behind_prefix(self, n: int) -> None:
        return None

    def device_bytes(
        self, config: Any, dtype: torch.dtype, cost: tuple[float, int], kept: int, ahead: int, demoted: int
    ) -> float:
        return super().device_bytes(config, dtype, cost, kept, ahead, demoted) - self.host_bytes(
            config, dtype, kept, ahead
        )

    def host_bytes(self, config: Any, dtype: torch.dtype, kept: int, ahead: int) -> int:
        return (kept + ahead) * len(self.on_host) * config.num_key_value_heads * config.head_dim * dtype.itemsize


class HostStore(SlotStore):
    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec: Hosted):
        self.spec = spec
        super().__init__(rows, policy, room, ctx, plain_codecs(ctx))

    @property
    def host_is_apart(self) -> bool:
        """Whether the host's memory is not the device's."""
        return self.ctx.device.type != "cpu"

    @property
    def needs_host_sync(self) -> bool:
        return self.host_is_apart and not self.ctx.ops.device_gather

    def _allocate(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return (self.ctx.empty_on_host if name in self.spec.on_host else self.ctx.empty)(*shape, dtype=dtype)

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        if self.host_is_apart:  # a copy that the host starts would wait for it
            self.append_by_index(k, v, pos)
        else:
            super().append(k, v, pos)

    def write_at(self, index: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if not self.host_is_apart or self.ctx.ops.device_gather:  # on a GPU the kernels write to the host's memory
            return super().write_at(index, k, v, pos)
        for (plane,), x in zip(self.planes, (k, v), strict=True):
            new = x.reshape(-1, x.shape[3]).to(plane.device)
            plane.view(-1, x.shape[3]).index_copy_(0, index.to(plane.device), new)
        return [k], [v]

    def unpack(self) -> list[Kept]:
        k, v = (plane.to(self.ctx.device).view(-1, plane.shape[3]) for (plane,) in self.planes)
        return self.slots.unpack(k, v)[0]

    def tensors(self) -> list[Tensor]:
        here = [plane for name, (plane,) in zip("kv", self.planes, strict=True) if name not in self.spec.on_host]
        return [*here, *self.slots.tensors()]

    def host_tensors(self) -> list[Tensor]:
        return [plane for name, (plane,) in zip("kv", self.planes, strict=True) if name in self.spec.on_host]

    def used_bytes(self) -> tuple[int, int, int]:
        k, v, bookkeeping = super().used_bytes()
        return 0 if "k" in self.spec.on_host else k, 0 if "v" in self.spec.on_host else v, bookkeeping
