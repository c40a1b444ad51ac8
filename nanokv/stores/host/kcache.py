"""Keys on the device, values on the host: a step reads all keys, and the values of the tokens that receive most
attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.policies.base import Policy
from nanokv.stores.host.base import Hosted, HostStore


@dataclass(frozen=True, kw_only=True)
class KCache(Hosted):
    """KCache (He and Wu 2024, arXiv:2404.18057, §3): keys alone decide the attention weights, so V stays on the host
    and only the values of the `n` tokens of largest weight, averaged over the query heads of a KV head, are fetched.

    Deviations: the weights of the fetched tokens are normalised to sum to one (norm=false: they stay as they are, as
    in the paper); among the `n` are always the text's first `sink` tokens, the new token and the `recent` tokens
    before it; a turn of several tokens fetches all values.

    n       tokens per KV head whose values are fetched
    sink    first tokens that are always fetched
    recent  last tokens that are always fetched
    norm    whether the fetched weights are made to sum to one
    """

    n: int = 128
    sink: int = 4
    recent: int = 32
    norm: bool = True
    on_host = ("v",)
    kernels = ("fetch_chunks",)

    selects_per_step = True

    def __post_init__(self):
        if self.sink < 0 or self.recent < 0 or self.n <= self.sink + self.recent:
            raise ValueError(
                f"n={self.n},sink={self.sink},recent={self.recent}; n must be more than sink + recent, and those at least 0"
            )

    def incompatible_policy(self, policy: Policy) -> str:
        if policy.decode_request and policy.decode_request.gumbel_seed is not None:
            return "scores with noise, which needs other weights than those that choose the values"
        if policy.positions_in_cache:
            return "reads the sinks with queries of their own, which one choice of values cannot serve: use positions=absolute"
        return super().incompatible_policy(policy)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> KCacheStore:
        return KCacheStore(rows, policy, room, ctx, self)


class KCacheStore(HostStore):
    def _planes_to_read(self, q: Tensor) -> list[list[Tensor]]:
        (k,), (v,) = self.planes
        return [[k], [v.to(self.ctx.device)]]

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        if q.shape[2] > 1:
            return super().read(q, pos, q_sink)
        s, spec, ((k,), (v,)) = self.slots, self.spec, self.planes
        n = s.max_used
        k, key_pos, length = k[:, :, :n], s.pos[:, :, :n], None if s.uniform else s.length
        _, lse, weights = self.ctx.ops.decode(q, k, k, length, key_pos, pos, s.sliding_window, "each")  # (B,H,n)
        weights = weights.unflatten(1, (k.shape[1], -1))  # (B,Hkv,G,n)
        mean, now = weights.mean(2), pos[:, :, None]
        always = (key_pos >= 0) & ((key_pos < spec.sink) | (key_pos > now - 1 - spec.recent))
        best = mean.masked_fill(always, 2.0).topk(min(spec.n, n), -1).indices
        values = self.ctx.empty(*best.shape, v.shape[3])
        self.ctx.ops.fetch_chunks(v, best, None, values)
        fetched = weights.gather(3, best[:, :, None].expand(-1, -1, weights.shape[2], -1))
        total = fetched.sum(-1, keepdim=True)
        out = (fetched @ values.float()) / (total.clamp(min=torch.finfo(torch.float32).tiny) if spec.norm else 1)
        wanted, scores = self.policy.decode_request, None
        if wanted is not None:
            scores = mean if wanted.over_group == "mean" else weights.amax(2)
        return out.flatten(1, 2)[:, :, None].to(q.dtype), lse + total.log().flatten(1, 2), scores
