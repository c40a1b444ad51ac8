"""Heads of different lengths, each taking only the bytes of its own tokens: K and V of all heads in one row of slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanokv.contract import Ask, Context, Kept, Policy
from nanokv.ops import merge
from nanokv.slots import Slots
from nanokv.stores.codec import Codec
from nanokv.stores.dense import Dense, SlotStore


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
        self.k.index_copy_(0, row, k.reshape(-1, k.shape[3]))
        self.v.index_copy_(0, row, v.reshape(-1, v.shape[3]))
        s.place(row, pos)
        if not s.frozen:
            self.held = [min(n + k.shape[2], limit) for n, (_, limit) in zip(self.held, self.spans, strict=True)]

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        s, watches = self.slots, self.policy.watches if q.shape[2] == 1 else None
        heads, group, length, parts = s.cursor.shape[1], q.shape[1] // s.cursor.shape[1], s.length, []
        for i, (first, limit) in enumerate(self.spans):
            b, h = divmod(i, heads)
            row, mine = slice(b, b + 1), slice(h * group, (h + 1) * group)
            n, valid = (limit, length[row, h : h + 1]) if s.frozen else (self.held[i], None)
            if near is None:
                parts.append(self._decode(q[row, mine], pos[row], first, first + n, valid, watches, h * group))
                continue
            m = min(s.protected, n)
            sinks = self._decode(
                near[row, mine], pos[row], first, first + m, None if valid is None else valid.clamp(max=m)
            )
            behind = None if valid is None else (valid - m).clamp(min=0)
            rest = [self._decode(q[row, mine], pos[row], first + m, first + n, behind)] if n > m else []
            parts.append((*merge([x[:2] for x in (sinks, *rest)]), None))
        out, lse = (torch.cat([p[j] for p in parts], 1).view(*q.shape[:2], *parts[0][j].shape[2:]) for j in (0, 1))
        if watches is None:
            return out, lse, None
        widest = max(p[2].shape[2] for p in parts)
        votes = [pad(p[2], (0, widest - p[2].shape[2])) for p in parts]
        return out, lse, torch.cat(votes, 1).view(q.shape[0], heads, widest)

    def _decode(
        self, q: Tensor, pos: Tensor, a: int, b: int, length: Tensor | None, watches: Ask | None = None, head: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One head's slots a … b−1."""
        s, decode = self.slots, self.ctx.ops.decode
        k, v, kpos = (x[None, None, a:b] for x in (self.k, self.v, s.flat_pos))
        if watches is None:
            return decode(q, k, v, length, kpos, pos, s.sliding_window)
        return decode(q, k, v, length, kpos, pos, s.sliding_window, watches.group, watches.noises(head))
