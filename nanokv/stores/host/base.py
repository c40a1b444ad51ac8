"""Tokens in slots of which K, V or both lie in the host's memory. On a CPU that is the device's own: nothing is moved."""

from __future__ import annotations

import torch
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context, Place, StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.dense import Dense, SlotStore
from nanokv.stores.quant.codec import Codec


class Hosted(Place):
    """Only slots that are as they came are taken apart: codes and scales of other stores belong together."""

    def refuses(self, keep: Policy, store: StoreSpec) -> str:
        return "" if type(store) is Dense else "only plain slots go to the host; use dense"


class HostStore(SlotStore):
    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, on_host: tuple[str, ...]):
        self.on_host = on_host
        plain = Codec(ctx.config.head_dim, ctx.dtype)
        super().__init__(rows, policy, room, ctx, (plain, plain))

    @property
    def waits(self) -> bool:
        return self.ctx.device.type != "cpu"

    def _plane(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return (self.ctx.host if name in self.on_host else self.ctx.empty)(*shape, dtype=dtype)

    def _write(self, at: Tensor, k: Tensor, v: Tensor) -> None:
        row = self.slots.flat(at)
        for (plane,), x in zip(self.planes, (k, v), strict=True):
            rows = x.reshape(-1, x.shape[3]).to(plane.device)
            plane.view(-1, x.shape[3]).index_copy_(0, row.to(plane.device), rows)

    def unpack(self) -> list[Kept]:
        k, v = (plane.to(self.ctx.device).view(-1, plane.shape[3]) for (plane,) in self.planes)
        return self.slots.unpack(k, v)

    def tensors(self) -> list[Tensor]:
        here = [plane for name, (plane,) in zip("kv", self.planes, strict=True) if name not in self.on_host]
        return [*here, *self.slots.tensors()]

    def hosted(self) -> list[Tensor]:
        return [plane for name, (plane,) in zip("kv", self.planes, strict=True) if name in self.on_host]

    def live(self) -> tuple[int, int, int]:
        k, v, rest = super().live()
        return 0 if "k" in self.on_host else k, 0 if "v" in self.on_host else v, rest
