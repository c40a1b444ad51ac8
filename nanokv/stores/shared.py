"""A prefix that all rows of a batch share is stored once (no plan names this: `Session.start` finds the prefix)."""

from __future__ import annotations

from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import StoreSpec
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


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
        """shared: the tokens before this position are the same in all rows."""
        parts = [row.split(shared) for row in rows]
        self.own_spec, self.policy, self.ctx = spec.behind_prefix(), policy, ctx
        self.prefix = spec.pack([parts[0][0]], policy, 0, ctx)
        self.own = self.own_spec.pack([rest for _, rest in parts], policy, room, ctx)
        self.shared = shared

    @property
    def slots(self) -> Slots:
        return self.own.slots

    @property
    def length(self) -> Tensor:
        return self.prefix.length + self.own.length

    @property
    def lossless_prefix(self) -> int | None:
        return self.prefix.lossless_prefix

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.own.append(k, v, pos)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.own.extend(k, v, pos)

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        B, H, T, D = q.shape
        out, lse, _ = self.prefix.read(q.transpose(0, 1).reshape(1, H, B * T, D), pos.reshape(1, B * T))
        parts = [(out.reshape(H, B, T, D).transpose(0, 1), lse.reshape(H, B, T).transpose(0, 1))]
        if self.own.slots.max_used:
            parts.append(self.own.read(q, pos)[:2])
        return *merge(parts), None

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
            frozen = self.own.slots.frozen
            self.own = self.own_spec.pack(self.own.unpack(), self.policy, room, self.ctx)
            if frozen:
                self.own.freeze()
        return True

    def refill(self, rows: list[Kept], room: int) -> bool:
        return self.own.refill([row.split(self.shared)[1] for row in rows], room)

    def tensors(self) -> list[Tensor]:
        return [*self.prefix.tensors(), *self.own.tensors()]

    def host_tensors(self) -> list[Tensor]:
        return []

    def used_bytes(self) -> tuple[int, int, int]:
        return tuple(a + b for a, b in zip(self.prefix.used_bytes(), self.own.used_bytes(), strict=True))
