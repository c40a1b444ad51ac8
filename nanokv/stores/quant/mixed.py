"""Two sets of tokens, one held well and one coarsely: what a policy demotes instead of dropping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.protocol import Context, StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.dense import Dense, SlotStore, join
from nanokv.stores.quant.codec import Codec
from nanokv.stores.quant.fp8 import Fp8
from nanokv.stores.quant.turbo import Turbo

HIGH = {16: Dense(), 8: Fp8(), 4: Turbo(), 3: Turbo(k=3, v=3)}


@dataclass(frozen=True, kw_only=True)
class Mixed(StoreSpec):
    """MiKV's two precisions (Yang et al. 2024, arXiv:2402.18096, §3): what the policy keeps at `high` bits, what it demotes at `low`; the
    two are read apart and merged by log-sum-exp.

    Each token is rounded once. With high=16 a token that loses its place moves to the coarse set as it is. With less, a token is judged
    once and for all: new ones stay exact until the policy looks. Deviation: the codes are TurboQuant's (a rotation and Lloyd-Max levels;
    8 bits: fp8's), where MiKV balances channels by the prompt's queries and ZipCache by its values before a
    uniform code.
    """

    high: int = 16
    low: int = 2
    coarse = True

    def __post_init__(self):
        if self.high not in HIGH or self.low not in (2, 3, 4) or self.low >= self.high:
            raise ValueError(
                f"mixed:high={self.high},low={self.low}; high is 16, 8, 4 or 3, low is 2, 3 or 4 and less than high"
            )

    def refuses(self, keep: Policy) -> str:
        if self.high < 16 and type(keep).slot is not Policy.slot:
            return f"demotes single tokens at any time, so they would be rounded twice; with it, mixed wants high=16, not {self.high}"
        if keep.watches and keep.watches.noise is not None:
            return "votes under noise, which cannot be put together from two sets: leave demote out"
        if self.high < 16 and keep.every and not keep.once:
            return f"judges what it kept anew, which would be rounded twice; with every=, mixed wants high=16, not {self.high}"
        return super().refuses(keep)

    def misfit(self, config: Any) -> str:
        return Turbo().misfit(config)

    def shared(self, config: Any) -> int:
        return Turbo(k=self.low, v=min(self.high, 4)).shared(config)

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        token, fixed = HIGH[self.high].cost(config, dtype, sink)
        return token, 3 * fixed

    def coarse_bytes(self, config: Any) -> float:
        return Turbo(k=self.low, v=self.low).cost(config, torch.float32, 0)[0]

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> MixedStore:
        return MixedStore(rows, policy, room, ctx, self)


@dataclass(frozen=True, kw_only=True)
class Grows(Policy):
    """How the sets lie that nothing leaves."""

    def keep(self, p: Prompt) -> Kept:
        return Kept.all(p)


class MixedStore:
    exact = 0

    waits = False

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec: Mixed):
        self.policy, self.ctx, self.spec = policy, ctx, spec
        self.moves = type(policy).slot is not Policy.slot  # whoever makes room for a new token goes to the coarse set
        self.apart = spec.high < 16 or policy.once  # what was judged is not judged again
        sets = [r.parts for r in rows]
        if self.apart and len(sets[0]) == 2:  # as a policy gives them; three: as `unpack` does
            sets = [[_none(r), *parts] for r, parts in zip(rows, sets, strict=True)]
        near, *high, low = ([parts[i] for parts in sets] for i in range(len(sets[0])))
        plain = Codec(ctx.config.head_dim, ctx.dtype)
        self.near = SlotStore([replace(r, rest=None) for r in near], policy, room, ctx, (plain, plain))
        self.high = self._set(high[0], HIGH[spec.high], 0) if high else None
        self.low = self._set(low, Turbo(k=spec.low, v=spec.low), room if self.moves else 0)
        self.slots = self.near.slots  # what the policy decides on

    def _set(self, rows: list[Kept], spec: StoreSpec, room: int) -> SlotStore:
        rows = [replace(r, rest=None, votes=None, limit=torch.full_like(r.limit, -1)) for r in rows]
        # no ring of the model's window: tokens come in no order of time, so the oldest slot may not be out of it
        config = self.ctx.config
        store = spec.pack(rows, Grows(), room, replace(self.ctx, config=replace(config, sliding_window=None)))
        store.slots.sliding_window = config.sliding_window
        store.slots.even = False  # heads fill up each at its own pace
        if self.near.slots.frozen:
            store.freeze()
        return store

    @property
    def sets(self) -> list[SlotStore]:
        return [self.near, self.low] if self.high is None else [self.near, self.high, self.low]

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.near.slots
        if not self.moves:
            self.near.append(k, v, pos)
            return
        at, full = self.policy.slot(s, pos), (s.cursor >= s.limit)[..., None]
        row = s.flat(at)
        gone = [x[0].view(-1, x[0].shape[3])[row].view_as(new) for x, new in zip(self.near.planes, (k, v), strict=True)]
        self.low.take(*gone, s.flat_pos[row].view_as(full), full)
        self.near.put(at, k, v, pos)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.near.extend(k, v, pos)  # a policy that demotes token by token watches, and is fed so

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        watches = self.policy.watches if q.shape[2] == 1 else None
        parts = [part for store in self.sets for part in store.parts(q, pos, each=True)]
        return join(parts, watches.group if watches else None, self.slots.cursor.shape[1])

    def maintain(self, written: int) -> None:
        """Nothing to do: tokens move when the policy says so."""

    def freeze(self) -> None:
        for store in self.sets:
            store.freeze()

    def unpack(self) -> list[Kept]:
        rows = None
        for store in reversed(self.sets):
            mine = store.unpack()
            rows = mine if rows is None else [replace(a, rest=b) for a, b in zip(mine, rows, strict=True)]
        return rows

    def reserve(self, room: int) -> bool:
        return False

    def refill(self, rows: list[Kept], room: int) -> bool:
        """The policy has looked at what was near: what it demotes joins the coarse set, and the rest stays, or joins the judged ones."""
        tops, rests = zip(*((r, r.rest) for r in rows), strict=True)
        if self.high is not None:
            self.high = self._joined(self.high, HIGH[self.spec.high], tops)
            tops = [_none(r) for r in rows]
        self.low = self._joined(self.low, Turbo(k=self.spec.low, v=self.spec.low), rests)
        tops = [replace(r, rest=None) for r in tops]
        if not self.near.refill(tops, room):
            frozen, self.near = self.near.slots.frozen, SlotStore(tops, self.policy, room, self.ctx, self.near.codecs)
            self.slots = self.near.slots
            if frozen:
                self.near.freeze()
        return True

    def _joined(self, store: SlotStore, spec: StoreSpec, rows: Sequence[Kept]) -> SlotStore:
        """A store of what this one holds and of these tokens. They are few: memory stays as tight as it was."""
        n = max(r.pos.shape[2] for r in rows)
        if n == 0:
            return store
        store = self._set(store.unpack(), spec, n)
        k, v, pos = (torch.cat([_wide(getattr(r, f), n) for r in rows]) for f in ("k", "v", "pos"))
        store.take(k, v, pos, pos >= 0)
        return store

    def tensors(self) -> list[Tensor]:
        return [x for store in self.sets for x in store.tensors()]

    def hosted(self) -> list[Tensor]:
        return []

    @property
    def length(self) -> Tensor:
        return sum(store.length for store in self.sets)

    def live(self) -> tuple[int, int, int]:
        return tuple(map(sum, zip(*(store.live() for store in self.sets), strict=True)))


def _none(r: Kept) -> Kept:
    """No token of this row."""
    empty, zero = slice(0, 0), torch.zeros_like(r.length)
    votes = None if r.votes is None else r.votes[:, :, empty]
    return Kept(r.k[:, :, empty], r.v[:, :, empty], r.pos[:, :, empty], zero, zero - 1, zero, votes, r.score)


def _wide(x: Tensor, n: int) -> Tensor:
    """(1,Hkv,N,…) → (1,Hkv,n,…), padded: positions with −1."""
    blank = x.new_full((*x.shape[:2], n - x.shape[2], *x.shape[3:]), -1 if x.dim() == 3 else 0)
    return torch.cat((x, blank), 2)
