"""A prefix that all rows of a batch share is stored once (no plan names this: `Session.start` finds the prefix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import StoreSpec
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy

QUERIES = 32  # of each KV head, that read the prefix together


class SharedPrefix:
    """The idea is ChunkAttention's (Ye et al. 2024, arXiv:2402.15220, §3): the queries of all rows read the shared keys
    together, then each row reads its own, and the two results are merged by their lse. Deviation: one prefix, which
    begins every row, where theirs is a tree of chunks.

    The prefix never changes. New tokens go to the row's own store.
    """

    needs_host_sync = False
    refill_ends_capture = True
    until_maintenance = None

    def __init__(self, spec: StoreSpec, rows: list[Kept], shared: int, policy: Policy, room: int, ctx: Context):
        """shared: the tokens before this position are the same in all rows. Only the first row need have them."""
        self.own_spec, self.policy, self.ctx = spec.behind_prefix(shared), policy, ctx
        self.prefix = spec.pack([rows[0].before(shared)], policy, 0, ctx)
        self.own = self.own_spec.pack([row.since(shared) for row in rows], policy, room, ctx)
        self.shared = shared
        group = ctx.config.num_attention_heads // ctx.config.num_key_value_heads
        self.rows_at_once = max(1, QUERIES // group)

    @property
    def slots(self) -> Slots:
        return self.own.slots

    @property
    def length(self) -> Tensor:
        return self.prefix.length + self.own.length

    @property
    def stored(self) -> Tensor:
        """(1 + B,Hkv) int32: tokens in the prefix, and tokens that each row has beside it."""
        return torch.cat((self.prefix.length, self.own.length))

    @property
    def lossless_prefix(self) -> int | None:
        return self.prefix.lossless_prefix

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.own.append(k, v, pos)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.own.extend(k, v, pos)

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        shared = [self._read_prefix(x, pos) for x in q.split(self.rows_at_once)]
        parts = shared if len(shared) == 1 else [tuple(torch.cat(x) for x in zip(*shared, strict=True))]
        if self.own.slots.max_used:
            parts.append(self.own.read(q, pos)[:2])
        return *merge(parts), None

    def _read_prefix(self, q: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of some rows' queries over the prefix → out (B,H,T,D), lse (B,H,T). To the prefix these are one row's
        queries: each KV head has those of all rows.
        """
        (B, H, T, D), heads = q.shape, self.prefix.length.shape[1]
        as_one = q.view(B, heads, -1, T, D).transpose(0, 1).reshape(1, B * H, T, D)
        out, lse, _ = self.prefix.read(as_one, pos[:1])
        out, lse = (x.reshape(heads, B, -1, *x.shape[2:]).transpose(0, 1).flatten(1, 2) for x in (out, lse))
        return out, lse

    def maintain(self, written: int) -> bool | None:
        return self.own.maintain(written)

    def freeze(self) -> None:
        self.prefix.freeze()
        self.own.freeze()

    def unpack(self) -> list[Kept]:
        (first,) = self.prefix.unpack()
        return [first.joined(row) for row in self.own.unpack()]

    def reserve(self, room: int) -> bool:
        if not self.own.reserve(room):
            self._hold(self.own.unpack(), room)
        return True

    def refill(self, rows: list[Kept], room: int) -> bool:
        return self.own.refill([row.since(self.shared) for row in rows], room)

    def reorder(self, rows: Sequence[int], room: int) -> None:
        """Let row i hold what row rows[i] holds."""
        held = self.own.unpack()
        self._hold([held[row] for row in rows], room)

    def _hold(self, rows: list[Kept], room: int) -> None:
        if not self.own.refill(rows, room):
            frozen = self.own.slots.frozen
            self.own = self.own_spec.pack(rows, self.policy, room, self.ctx)
            if frozen:
                self.own.freeze()

    def tensors(self) -> list[Tensor]:
        return [*self.prefix.tensors(), *self.own.tensors()]

    def host_tensors(self) -> list[Tensor]:
        return []

    def used_bytes(self) -> tuple[int, int, int]:
        return tuple(a + b for a, b in zip(self.prefix.used_bytes(), self.own.used_bytes(), strict=True))
