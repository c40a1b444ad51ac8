"""Two precisions: tokens that matter are held well, and demoted ones go to a low-precision tier instead of being
evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.protocol import StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.dense import Dense, SlotStore, join, plain_codecs
from nanokv.stores.quant.codec import CodeState
from nanokv.stores.quant.fp8 import Fp8
from nanokv.stores.quant.turbo import Turbo

HIGH = {16: Dense(), 8: Fp8(), 4: Turbo(), 3: Turbo(k=3, v=3)}


@dataclass(frozen=True, kw_only=True)
class Mixed(StoreSpec):
    """MiKV's two precisions (Yang et al. 2024, arXiv:2402.18096, §3): `high` bits for tokens that the policy keeps,
    `low` bits for those that it demotes. The tiers are read apart and merged by their logsumexp.

    Each token is rounded once. With high=16 a token is exact until the policy demotes it, and is then rounded to
    `low` bits. With fewer bits a token is scored only once: it stays exact until the policy scores it, and then goes
    to one of the two tiers for good. Deviation: the codes are TurboQuant's (a rotation and Lloyd-Max levels; 8 bits:
    fp8's), where MiKV balances channels by the prompt's queries, and ZipCache by its values, before a uniform code.

    high  bits of kept tokens: 16 (exact), 8, 4 or 3
    low   bits of demoted tokens: 4, 3 or 2
    """

    high: int = 16
    low: int = 2
    has_low_precision_tier = True
    state_type = CodeState

    def __post_init__(self):
        if self.high not in HIGH or self.low not in (2, 3, 4) or self.low >= self.high:
            raise ValueError(
                f"mixed:high={self.high},low={self.low}; high is 16, 8, 4 or 3, low is 2, 3 or 4 and less than high"
            )

    def incompatible_policy(self, policy: Policy) -> str:
        if self.high < 16 and policy.eviction == "score":
            return f"demotes single tokens at any time, so they would be rounded twice: use high=16, not {self.high}"
        if policy.low_bits not in (0, self.low):
            return f"bounds the error of {policy.low_bits} bits: give low={policy.low_bits} here too, not {self.low}"
        if policy.decode_request and policy.decode_request.gumbel_seed is not None:
            return "scores with noise, which cannot be joined from two tiers: leave demote out"
        if self.high < 16 and policy.rescore_every and not policy.scores_once:
            return f"scores again what it kept, which would be rounded twice: with every= use high=16, not {self.high}"
        return super().incompatible_policy(policy)

    def incompatible_model(self, config: Any) -> str:
        return Turbo().incompatible_model(config)

    def constant_bytes(self, config: Any) -> int:
        # one rotation, and a table of levels for the bits of each tier; with high=16 or 8 one table more than there is
        return Turbo(k=self.low, v=min(self.high, 4)).constant_bytes(config)

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        token, fixed = HIGH[self.high].cost(config, dtype, sink)
        return token, 3 * fixed

    def device_bytes(
        self, config: Any, dtype: torch.dtype, cost: tuple[float, int], kept: int, ahead: int, demoted: int
    ) -> float:
        exact, low = Dense().cost(config, dtype, 0)[0], self.low_tier.cost(config, dtype, 0)[0]
        return kept * cost[0] + ahead * exact + demoted * low + cost[1]  # new tokens are exact until they are scored

    @property
    def low_tier(self) -> Turbo:
        return Turbo(k=self.low, v=self.low)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> MixedStore:
        return MixedStore(rows, policy, room, ctx, self)


@dataclass(frozen=True, kw_only=True)
class AppendOnly(Policy):
    """The policy of a tier that nothing leaves."""

    def keep(self, p: Prompt) -> Kept:
        return Kept.all(p)


class MixedStore:
    """Two or three sets of slots, each of them a tier. `undecided` holds exact tokens that the policy may still demote,
    `low` the demoted ones. `high` exists only if tokens are scored once: it holds those that were kept.
    """

    needs_host_sync, refill_ends_capture = False, True
    until_maintenance = None
    lossless_prefix = 0

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec: Mixed):
        self.policy, self.ctx, self.spec = policy, ctx, spec
        self.demotes_while_decoding = policy.eviction == "score"  # evicted tokens move to the low-precision tier
        sets = [r.parts for r in rows]
        # tokens that were scored once for all get a tier of their own. A policy hands over two sets, `unpack` three
        if (spec.high < 16 or policy.scores_once) and len(sets[0]) == 2:
            sets = [[_without_tokens(r), *parts] for r, parts in zip(rows, sets, strict=True)]
        undecided, *high, low = ([parts[i] for parts in sets] for i in range(len(sets[0])))
        self.undecided = SlotStore([replace(r, demoted=None) for r in undecided], policy, room, ctx, plain_codecs(ctx))
        self.high = self._tier(high[0], HIGH[spec.high], 0) if high else None
        self.low = self._tier(low, self.spec.low_tier, room if self.demotes_while_decoding else 0)
        self.slots = self.undecided.slots  # the policy decides on these

    def _tier(self, rows: list[Kept], spec: StoreSpec, room: int) -> SlotStore:
        rows = [replace(r, demoted=None, running_scores=None, limit=torch.full_like(r.limit, -1)) for r in rows]
        # no ring of the model's window: tokens come in no order of time, so the oldest slot may still be inside it
        store = spec.pack(rows, AppendOnly(), room, replace(self.ctx, sliding_window=None))
        store.slots.sliding_window = self.ctx.sliding_window
        store.slots.uniform = False  # heads fill up at different paces
        if self.undecided.slots.frozen:
            store.freeze()
        return store

    @property
    def tiers(self) -> list[SlotStore]:
        return [self.undecided, self.low] if self.high is None else [self.undecided, self.high, self.low]

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.slots
        if not self.demotes_while_decoding:
            self.undecided.append(k, v, pos)
            return
        full = (s.cursor >= s.limit)[..., None]
        row, left = s.take_lowest(self.policy.slot_scores(s, pos), pos, self.ctx.ops.take_lowest)
        planes = (planes[0] for planes in self.undecided.planes)
        evicted = [x.view(-1, x.shape[3])[row].view_as(new) for x, new in zip(planes, (k, v), strict=True)]
        self.low.append_masked(*evicted, left.view_as(full), full)
        self.undecided.write_at(row, k, v, pos[:, None])

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        # a policy that demotes while decoding scores every step, so its tokens come one by one
        self.undecided.extend(k, v, pos)

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        wanted = self.policy.step_request(q.shape[2])
        parts = [part for store in self.tiers for part in store.read_parts(q, pos, each_head=True)]
        return join(parts, wanted.over_group if wanted else None, self.slots.cursor.shape[1])

    def maintain(self, written: int) -> None:
        """Nothing to do: tokens move when the policy says so."""

    def freeze(self) -> None:
        for store in self.tiers:
            store.freeze()

    def unpack(self) -> list[Kept]:
        rows = None
        for store in reversed(self.tiers):
            mine = store.unpack()
            rows = mine if rows is None else [replace(a, demoted=b) for a, b in zip(mine, rows, strict=True)]
        return rows

    def reserve(self, room: int) -> bool:
        return False

    def refill(self, rows: list[Kept], room: int) -> bool:
        """The policy has scored the undecided tokens: those that it demotes join the low tier, and the others stay or join
        the high tier.
        """
        kept, demoted = rows, [r.demoted for r in rows]
        if self.high is not None:
            self.high = self._extended(self.high, HIGH[self.spec.high], kept)
            kept = [_without_tokens(r) for r in rows]
        self.low = self._extended(self.low, self.spec.low_tier, demoted)
        kept = [replace(r, demoted=None) for r in kept]
        if not self.undecided.refill(kept, room):
            frozen, codecs = self.slots.frozen, self.undecided.codecs
            self.undecided = SlotStore(kept, self.policy, room, self.ctx, codecs)
            self.slots = self.undecided.slots
            if frozen:
                self.undecided.freeze()
        return True

    def _extended(self, store: SlotStore, spec: StoreSpec, rows: Sequence[Kept]) -> SlotStore:
        """A new tier that holds what `store` holds and these tokens. It is made again at each rescore."""
        n = max(r.pos.shape[2] for r in rows)
        if n == 0:
            return store
        store = self._tier(store.unpack(), spec, n)
        k, v, pos = (torch.cat([_padded(getattr(r, f), n) for r in rows]) for f in ("k", "v", "pos"))
        store.append_masked(k, v, pos, pos >= 0)
        return store

    def tensors(self) -> list[Tensor]:
        return [x for store in self.tiers for x in store.tensors()]

    def host_tensors(self) -> list[Tensor]:
        return []

    @property
    def length(self) -> Tensor:
        return sum(store.length for store in self.tiers)

    def used_bytes(self) -> tuple[int, int, int]:
        return tuple(map(sum, zip(*(store.used_bytes() for store in self.tiers), strict=True)))


def _without_tokens(r: Kept) -> Kept:
    """This row with no token."""
    empty, zero = slice(0, 0), torch.zeros_like(r.length)
    scores = None if r.running_scores is None else r.running_scores[:, :, empty]
    return Kept(r.k[:, :, empty], r.v[:, :, empty], r.pos[:, :, empty], zero, zero - 1, zero, scores, r.layer_score)


def _padded(x: Tensor, n: int) -> Tensor:
    """(1,Hkv,N,…) → (1,Hkv,n,…): positions are padded with −1, numbers with 0."""
    blank = x.new_full((*x.shape[:2], n - x.shape[2], *x.shape[3:]), -1 if x.dim() == 3 else 0)
    return torch.cat((x, blank), 2)
