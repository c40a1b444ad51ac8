"""Keys on the device, values on the host: a step reads all keys, and the values of those that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context, StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.host.base import Hosted, HostStore


@dataclass(frozen=True, kw_only=True)
class KCache(Hosted):
    """KCache (He and Wu 2024, arXiv:2404.18057, §3): attention is decided by keys alone, so V waits on the host and only the `n` tokens of
    greatest weight, mean over the query heads of a KV head, are fetched.

    Deviations: the weights of what is fetched are made to sum to one (`norm=false`: left as they are, as in the paper); the text's
    first `sink` and last `recent` tokens are always among them; the several tokens of a turn fetch all.
    """

    n: int = 128
    sink: int = 4
    recent: int = 32
    norm: bool = True

    def __post_init__(self):
        if self.sink < 0 or self.recent < 0 or self.n <= self.sink + self.recent:
            raise ValueError(
                f"n={self.n},sink={self.sink},recent={self.recent}; n must be more than sink + recent, and those at least 0"
            )

    def pack(self, store: StoreSpec, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> KCacheStore:
        return KCacheStore(rows, policy, room, ctx, self)

    def refuses(self, keep: Policy, store: StoreSpec) -> str:
        if keep.watches and keep.watches.noise is not None:
            return "votes with noise take another pass over the keys than the weights that choose values; use another policy or place"
        if keep.positions == "cache":
            return "the sinks are read with queries of their own, which no one choice of values serves; use positions=absolute"
        return super().refuses(keep, store)

    def host_bytes(self, config: Any, dtype: torch.dtype, slots: int) -> int:
        return slots * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KCacheStore(HostStore):
    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, place: KCache):
        self.place = place
        super().__init__(rows, policy, room, ctx, ("v",))

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        s, ((k,), (v,)) = self.slots, self.planes
        if q.shape[2] > 1:
            self.planes, home = [[k], [v.to(self.ctx.device)]], self.planes
            try:
                return super().read(q, pos, near)
            finally:
                self.planes = home
        n = s.bound
        k, kpos, length = k[:, :, :n], s.pos[:, :, :n], None if s.even else s.length
        _, lse, each = self.ctx.ops.decode(q, k, k, length, kpos, pos, s.sliding_window, "each")  # (B,H,n)
        each = each.unflatten(1, (k.shape[1], -1))
        worth, when = each.mean(2), pos[:, :, None]
        always = (kpos >= 0) & ((kpos < self.place.sink) | (kpos > when - 1 - self.place.recent))
        best = worth.masked_fill(always, 2.0).topk(min(self.place.n, n), -1).indices
        values = self.ctx.empty(*best.shape, v.shape[3])
        self.ctx.ops.fetch(v, best, None, values)
        weight = each.gather(3, best[:, :, None].expand(-1, -1, each.shape[2], -1))  # (B,Hkv,G,n)
        total = weight.sum(-1, keepdim=True)
        out = (weight @ values.float()) / (total.clamp(min=torch.finfo(torch.float32).tiny) if self.place.norm else 1)
        watches, votes = self.policy.watches, None
        if watches is not None:
            votes = worth if watches.group == "mean" else each.amax(2)
        return out.flatten(1, 2)[:, :, None].to(q.dtype), lse + total.log().flatten(1, 2), votes
