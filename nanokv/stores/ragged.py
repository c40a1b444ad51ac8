"""Heads of different lengths, each taking only the bytes of its own tokens: K and V of all heads in one row of slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context
from nanokv.cache.scores import Ask
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy
from nanokv.stores.dense import Dense, SlotStore
from nanokv.stores.quant.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Ragged(Dense):
    """K and V unquantised, one head's slots behind the other's (the flattened layout of Ada-KV, arXiv:2407.11550, §4.3).

    Deviation: a head has room for what will be generated from the start, so that nothing moves while decoding. On the CPU heads are
    read one after the other.
    """

    pads = False

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> RaggedStore:
        return RaggedStore(rows, policy, room, ctx)


class RaggedStore(SlotStore):
    """K, V (slots,D). What does not look at a single head is the dense store's."""

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context):
        self.slots, self.policy, self.ctx = Slots(rows, room, ctx.config.sliding_window, ragged=True), policy, ctx
        plain = Codec(ctx.config.head_dim, ctx.dtype)
        self.codecs, self.pin, self.exact, self.pinned = (plain, plain), 0, None, []
        self.k, self.v = (ctx.empty(self.slots.total, ctx.config.head_dim) for _ in range(2))  # (slots,D)
        self.planes = [[self.k], [self.v]]
        self._fill(rows)

    def _fill(self, rows: list[Kept]) -> None:
        self.k.zero_(), self.v.zero_()  # a masked slot must still be a number: 0 · NaN is NaN
        first, limit = self.slots.first.flatten().tolist(), self.slots.limit.flatten().tolist()
        self.spans = list(zip(first, limit, strict=True))  # what the host knows of each (row, head): first slot, slots
        self.held = self.slots.length.flatten().tolist()
        heads = [(r, h) for r in rows for h in range(r.k.shape[1])]
        for (r, h), (a, _), n in zip(heads, self.spans, self.held, strict=True):
            self.k[a : a + n], self.v[a : a + n] = r.k[0, h, :n], r.v[0, h, :n]

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.slots
        row = s.flat(self.policy.slot(s, pos))
        self.ctx.ops.append(k, v, row, self.k, self.v)
        s.place(row, pos)
        if not s.frozen:
            self.held = [min(n + k.shape[2], limit) for n, (_, limit) in zip(self.held, self.spans, strict=True)]

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        s, watches = self.slots, self.policy.watches if q.shape[2] == 1 else None
        spans = self.spans if s.frozen else [(a, n) for (a, _), n in zip(self.spans, self.held, strict=True)]
        length = s.length if s.frozen or q.is_cuda else None  # a copy from the host would wait
        if near is None:
            return self._decode(q, pos, spans, s.first, length, watches)
        m = s.protected
        first = [(a, min(n, m)) for a, n in spans]
        rest = [(a + min(n, m), max(0, n - m)) for a, n in spans]
        sinks = self._decode(near, pos, first, s.first, None if length is None else length.clamp(max=m))
        behind = self._decode(q, pos, rest, s.first + m, None if length is None else (length - m).clamp(min=0))
        return *merge([sinks[:2], behind[:2]]), None

    def _decode(
        self,
        q: Tensor,
        pos: Tensor,
        spans: list[tuple[int, int]],
        first: Tensor,
        length: Tensor | None,
        watches: Ask | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of each head the slots that `spans` names."""
        s, decode = self.slots, self.ctx.ops.decode_ragged
        ask = q, self.k, self.v, spans, first, length, s.flat_pos, pos, s.sliding_window
        return decode(*ask) if watches is None else decode(*ask, watches.group, watches.noises(0))
