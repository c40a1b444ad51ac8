"""Slots for heads that hold different numbers of tokens: each head pays for its own only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy
from nanokv.stores.dense import Dense, SlotStore, plain_codecs


@dataclass(frozen=True, kw_only=True)
class Ragged(Dense):
    """K and V unquantised, one head's slots behind the other's (the flattened layout of Ada-KV, arXiv:2407.11550,
    §4.3).

    Deviation: a head has room for what will be generated from the start, so nothing moves while decoding. On the CPU
    heads are read one after the other.
    """

    pads_heads = reads_by_chunk = False
    kernels = ("decode_ragged",)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> RaggedStore:
        return RaggedStore(rows, policy, room, ctx)


class RaggedStore(SlotStore):
    """K and V as (slots,D). What does not look at a single head is inherited from the dense store."""

    refill_ends_capture = True  # a step's launches know how long the longest head is

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context):
        self.slots, self.policy, self.ctx = Slots(rows, room, ctx.sliding_window, ragged=True), policy, ctx
        self.codecs, self.rounds, self.n_pinned = plain_codecs(ctx), False, 0
        self.lossless_prefix, self.pinned, self.exact_per_head = None, [], None
        self.k, self.v = (ctx.empty(self.slots.total, ctx.config.head_dim) for _ in range(2))
        self.planes = [[self.k], [self.v]]
        self._fill(rows)

    def _fill(self, rows: list[Kept]) -> None:
        self.k.zero_(), self.v.zero_()  # a masked slot must still hold a number: 0 · NaN is NaN
        first, limit = self.slots.first_index.flatten().tolist(), self.slots.limit.flatten().tolist()
        # the host's copy, per (row, head): first slot, number of slots
        self.spans = list(zip(first, limit, strict=True))
        self.lengths = self.slots.length.flatten().tolist()
        heads = [(r, h) for r in rows for h in range(r.k.shape[1])]
        for (r, h), (a, _), n in zip(heads, self.spans, self.lengths, strict=True):
            self.k[a : a + n], self.v[a : a + n] = r.k[0, h, :n], r.v[0, h, :n]

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.append_by_index(k, v, pos)
        if not self.slots.frozen:
            new = k.shape[2]
            self.lengths = [min(n + new, limit) for n, (_, limit) in zip(self.lengths, self.spans, strict=True)]

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        s, wanted = self.slots, self.policy.step_request(q.shape[2])
        spans = self.spans if s.frozen else [(a, n) for (a, _), n in zip(self.spans, self.lengths, strict=True)]
        length = s.length if s.frozen or q.is_cuda else None  # on a GPU a copy of the host's lengths would wait
        if q_sink is None:
            return self._attend(q, pos, spans, s.first_index, length, wanted)
        m = s.n_sink
        sinks = [(a, min(n, m)) for a, n in spans]
        others = [(a + min(n, m), max(0, n - m)) for a, n in spans]
        at_sinks = self._attend(q_sink, pos, sinks, s.first_index, None if length is None else length.clamp(max=m))
        behind = self._attend(q, pos, others, s.first_index + m, None if length is None else (length - m).clamp(min=0))
        return *merge([at_sinks[:2], behind[:2]]), None

    def _attend(
        self,
        q: Tensor,
        pos: Tensor,
        spans: Sequence[tuple[int, int]],
        first_index: Tensor,
        length: Tensor | None,
        wanted: ScoreRequest | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention over the slots that `spans` names, per head."""
        s, decode = self.slots, self.ctx.ops.decode_ragged
        given = q, self.k, self.v, spans, first_index, length, s.flat_pos, pos, s.sliding_window
        return decode(*given) if wanted is None else decode(*given, wanted.over_group, wanted.noise(0))
