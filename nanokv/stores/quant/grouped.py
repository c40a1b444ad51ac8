"""Groups of tokens that share scales, and a window of exact tokens: memory and schedule of the int stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import merge, part_of
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, StoreState
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy

ENCODED_AT_ONCE = 32_768  # tokens of all heads together, which bounds the memory that rounding them takes
Planes = tuple[Tensor, ...]  # (…,groups,·,·) each: words, scale and zero point, and what a format has beside them


class GroupSlots(Slots):
    """Each head's slots in this order: its `pinned` exact tokens, the residual window, then whole groups from slot `n_exact`.

    A head's tokens are numbered from 0 as they are written. The first `pinned` stay where they are. The others
    enter the window. Whenever the window holds residual + group tokens, its first `group` tokens move behind it and
    the others close up. `n_flushed` counts the groups that have moved. A head that grows has memory for all its
    groups; a head with a limit has a ring of `ring_groups` groups. Evicted tokens are marked with pos = −1.
    """

    def __init__(self, rows: list[Kept], room: int, sliding_window: int | None, pin: int, group: int, residual: int):
        self.group, self.residual, self.room = group, residual, room
        # (B,Hkv) int32. Sinks must be pinned, because a ring of groups would evict them
        self.pinned = torch.cat([r.sink.clamp(min=pin) if r.state is None else r.state.pinned for r in rows])
        super().__init__(rows, room, sliding_window)
        # (B,Hkv,1) int64: the flat index from which the cursor counts, and how many slots of groups lie before each head
        self.window_first = torch.empty_like(self.first_index)
        self.skipped = self.first_index // self.capacity * (self.capacity - self.n_exact)
        self.note_flushed()

    def note_flushed(self) -> None:
        """Follow a change of `n_flushed`."""
        torch.mul(self.n_flushed, self.group, out=self.in_groups)
        torch.sub(self.first_index, self.in_groups[..., None], out=self.window_first)

    def _lay_out(self) -> int:
        """Set the numbers that say what each slot is for → slots per head."""
        wraps = (self.limit < self.cursor + self.room) | (self.limit == self.asked_limit)
        if self.sliding_window is not None:
            wraps |= self.limit == self.sink + self.sliding_window
        self.wraps = bool(wraps.any())
        self.n_exact = int(self.pinned.max()) + self.residual + self.group
        if not self.wraps:  # a text that never fills the window needs no more than its own length
            self.n_exact = min(self.n_exact, int(self.limit.max()))
        grows = self._groups(self.limit - self.pinned - self.residual)
        self.ring_groups = torch.where(wraps, _ring_groups(self.limit, self.sink, self.residual, self.group), grows)
        self.n_flushed = self._groups(self.cursor - self.pinned - self.residual)
        self.in_groups = self.n_flushed * self.group  # (B,Hkv) int32: tokens that have left the window
        return self.n_exact + int(self.ring_groups.max()) * self.group

    def _groups(self, tokens: Tensor) -> Tensor:
        return tokens.div(self.group, rounding_mode="floor").clamp(min=0)

    def _slots_of(self, b: int, n: int) -> Tensor:
        return self.slot_of(torch.arange(n, device=self.cursor.device).expand(1, self.cursor.shape[1], n), b)[0]

    def slot_of(self, nth: Tensor, b: int | None = None) -> Tensor:
        """(B,Hkv,n): the slots of the tokens numbered nth (B,Hkv,n); b: of this row alone."""
        rows = slice(None) if b is None else slice(b, b + 1)
        numbers = (x[rows, :, None] for x in (self.pinned, self.in_groups, self.ring_groups.clamp(min=1)))
        return _slot_of(nth, *numbers, self.n_exact, self.group)

    def next_slots(self, n: int) -> Tensor:
        """(B,Hkv,n): the next free slots of the window."""
        nth = self.cursor[..., None] + torch.arange(n, dtype=torch.int32, device=self.cursor.device)
        return nth - self.in_groups[..., None]

    def take(self, pos: Tensor, take_slots: Callable[..., Tensor]) -> Tensor:
        self._evict(pos)
        # the window is no ring, so no limit may bend the cursor
        limit = torch.full_like(self.limit, torch.iinfo(torch.int32).max) if self.wraps else self.limit
        index = take_slots(self.cursor, limit, self.sink, self.window_first, pos, self.flat_pos)
        self._count_on_host(1)
        return index

    def record(self, index: Tensor, pos: Tensor) -> None:
        self._evict(pos)
        super().record(index, pos)

    def _evict(self, pos: Tensor) -> None:
        """Mark what the new tokens at pos (B,T) evict: in a full ring each of them evicts an old one."""
        if self.wraps:
            nth = self.cursor[..., None] + torch.arange(pos.shape[1], device=pos.device)
            full = nth >= self.limit[..., None]
            oldest = self.slot_of(nth - (self.limit - self.sink)[..., None])
            # a head that is not full evicts nothing: its index is the slot that is written next, which is empty
            evicted = torch.where(full, oldest, self.next_slots(pos.shape[1]))
            self.flat_pos.index_fill_(0, self.flat_index(evicted), -1)

    def tensors(self) -> list[Tensor]:
        return [
            *super().tensors(),
            self.pinned,
            self.n_flushed,
            self.in_groups,
            self.ring_groups,
            self.window_first,
            self.skipped,
        ]


@dataclass(frozen=True)
class GroupState(StoreState):
    """One row of a GroupedStore as it lies in memory: exact tokens, groups, and how the slots are divided."""

    k: Tensor  # (1,Hkv,n_exact,D)
    v: Tensor
    pos: Tensor  # (1,Hkv,S) int32
    cursor: Tensor  # (1,Hkv) int32
    n_flushed: Tensor  # (1,Hkv) int32
    pinned: Tensor  # (1,Hkv) int32
    k_groups: Planes  # (1,Hkv,groups,…) each
    v_groups: Planes

    def check(self, row: Kept, spec: Any, ctx: Context) -> None:
        heads, dim, group = ctx.config.num_key_value_heads, ctx.config.head_dim, spec.group
        blank = ctx.empty(1, heads, 1, group, dim).zero_()
        one_group = [x for planes in spec.encode(blank, blank, ctx) for x in planes]
        n, groups = self.k.shape[2], self.k_groups[0].shape[2]
        found = [*self.k_groups, *self.v_groups]
        if (
            any(
                x.shape != (1, heads, n, dim) or not x.is_floating_point() or not x.isfinite().all()
                for x in (self.k, self.v)
            )
            or self.pos.shape != (1, heads, n + groups * group)
            or any(x.shape != (1, heads) for x in (self.cursor, self.n_flushed, self.pinned))
            or any(x.dtype != torch.int32 for x in (self.pos, self.cursor, self.n_flushed, self.pinned))
            or any(
                (x.dtype, x.shape) != (one.dtype, (*one.shape[:2], groups, *one.shape[3:]))
                for x, one in zip(found, one_group, strict=True)
            )
            or not all(x.isfinite().all() for x in found if x.is_floating_point())
        ):
            raise ValueError("its groups have other shapes or types, or hold values that are no numbers")
        spec.check_codes(self.k_groups, self.v_groups)
        n_in_window = self.cursor - self.pinned - self.n_flushed * group
        slots, known = self._slots(row, spec, ctx.sliding_window)
        length = (self.pos >= 0).sum(-1)
        if not (
            (self.pinned >= 0).all()
            and (self.pinned <= max(spec.pin, int(row.sink.max()))).all()
            and ((self.n_flushed >= 0) & (self.n_flushed <= self.cursor)).all()
            and (n_in_window < spec.residual + group).all()
            and ((n_in_window >= spec.residual) | (self.n_flushed == 0)).all()
            and (length == row.length).all()
            and ((slots >= 0) & (slots < self.pos.shape[2])).all()
            and torch.where(known, self.pos.gather(2, slots) == row.pos, True).all()
        ):
            raise ValueError("its groups do not hold the tokens that it names")

    def _slots(self, row: Kept, spec: Any, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        """(1,Hkv,N): where the tokens of this row must lie, by the rule of GroupSlots, and which of them there are."""
        limit, sink = row.limit, row.sink
        if sliding_window is not None:
            most = sink + sliding_window
            limit = torch.where(limit < 0, most, torch.minimum(limit, most))
        ring = _ring_groups(limit, sink, spec.residual, spec.group)
        ring = torch.where(limit < 0, torch.iinfo(torch.int32).max, ring)
        i = torch.arange(row.pos.shape[2], device=row.pos.device)
        known = i < row.length[..., None]
        # a ring has evicted tokens behind its sinks, so the others have later numbers
        nth = torch.where(i < sink[..., None], i, (self.cursor - row.length)[..., None] + i)
        numbers = (x[..., None] for x in (self.pinned, self.n_flushed * spec.group, ring))
        slots = _slot_of(nth, *numbers, self.k.shape[2], spec.group)
        return slots.masked_fill(~known, 0).long(), known

    def select(self, index: Tensor) -> GroupState:
        raise ValueError("the tokens of a group share scales and can only leave together")

    def tensors(self) -> dict[str, Tensor]:
        found = {"k": self.k, "v": self.v, "pos": self.pos, "cursor": self.cursor, "moved": self.n_flushed}
        found["pin"] = self.pinned
        for name, planes in (("k", self.k_groups), ("v", self.v_groups)):
            found |= {f"{name}{i}": x for i, x in enumerate(planes)}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> GroupState:
        planes = (
            tuple(tensors[f"{name}{i}"] for i in range(sum(key[0] == name and key[1:].isdigit() for key in tensors)))
            for name in "kv"
        )
        fields = (tensors[name] for name in ("k", "v", "pos", "cursor", "moved"))
        pinned = tensors["pin"].to(torch.int32).expand_as(tensors["cursor"])  # one number for all heads in older files
        return cls(*fields, pinned, *planes)


def _ring_groups(limit: Tensor, sink: Tensor, residual: int, group: int) -> Tensor:
    """How many groups hold what a ring of `limit` tokens (B,Hkv) has behind its sinks and the residual window; at least one."""
    return (-((sink + residual - limit) // group)).clamp(min=1)  # rounded up


def _slot_of(nth: Tensor, pinned: Tensor, in_groups: Tensor, ring: Tensor, n_exact: int, group: int) -> Tensor:
    """(B,Hkv,n): the slots of the tokens numbered nth (B,Hkv,n). pinned, in_groups (tokens that have left the window) and
    ring (groups in memory) are (B,Hkv,1).
    """
    behind = nth - pinned  # its number among those that are not pinned
    group_slot = n_exact + behind.div(group, rounding_mode="floor") % ring * group + behind % group
    exact_slot = torch.where(behind < 0, nth, nth - in_groups)
    return torch.where((behind >= 0) & (behind < in_groups), group_slot, exact_slot)


def _runs(values: Sequence, most: int) -> Iterator[tuple[slice, Any]]:
    """Runs of at most so many neighbouring equal values: (where, the value)."""
    a = 0
    for value, same in groupby(values):
        end = a + len(list(same))
        for first in range(a, end, most):
            yield slice(first, min(first + most, end)), value
        a = end


class WindowCounts:
    """The host's count of the tokens in each window, so that no step asks the device. Lists have a number per (row, head).

    Every step writes as many tokens to each head, so one number, `written`, counts them all.
    """

    def __init__(self, slots: GroupSlots):
        self.group, self.full = slots.group, slots.residual + slots.group
        self.pinned, self.n_flushed, self.ring_groups = (
            x.flatten().tolist() for x in (slots.pinned, slots.n_flushed, slots.ring_groups)
        )
        # window i holds before[i] + written tokens
        self.before = (slots.cursor - slots.pinned - slots.in_groups).flatten().tolist()
        self.written = 0
        self._note_largest()

    def _note_largest(self) -> None:
        self._fullest = max(self.before)
        self._reach = max(map(sum, zip(self.pinned, self.before, strict=True)))

    @property
    def free(self) -> int:
        """How many tokens may be written until a window is full."""
        return self.full - self._fullest - self.written

    @property
    def reach(self) -> int:
        """How many exact slots, from the first on, hold all exact tokens of every head."""
        return self._reach + self.written

    @property
    def exact_tokens(self) -> int:
        """Of all heads together."""
        return sum(self.pinned) + sum(self.before) + self.written * len(self.before)

    @property
    def groups_in_memory(self) -> int:
        """Of all heads together."""
        return sum(map(min, self.n_flushed, self.ring_groups))

    def take_full(self) -> tuple[list[int], list[int], list[int]]:
        """Count a group as moved out of each full window → these windows, the group that it becomes in memory, and the
        slot where it lies.
        """
        due = [i for i, n in enumerate(self.before) if n + self.written >= self.full]
        into = [self.n_flushed[i] % self.ring_groups[i] for i in due]
        for i in due:
            self.before[i] -= self.group
            self.n_flushed[i] += 1
        self._note_largest()
        return due, into, [self.pinned[i] for i in due]


class GroupedStore:
    """Words, scales and zero points of whole groups; K and V of the exact tokens."""

    needs_host_sync = refill_ends_capture = False
    until_maintenance = None
    lossless_prefix: int | None = 0

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec: Any):
        self.policy, self.ctx, self.spec = policy, ctx, spec
        pin, group = spec.pin, spec.group
        self.slots = s = GroupSlots(rows, room, ctx.sliding_window, pin, group, spec.residual)
        n, heads, dim = len(rows), ctx.config.num_key_value_heads, ctx.config.head_dim
        self.k, self.v = (ctx.empty(n, heads, s.n_exact, dim).zero_() for _ in range(2))
        self.n_groups = (s.total // s.cursor.numel() - s.n_exact) // group
        blank = ctx.empty(n, heads, 1, group, dim).zero_()
        self.groups = [
            [x.expand(-1, -1, self.n_groups, -1, -1).clone() for x in planes]
            for planes in spec.encode(blank, blank, ctx)
        ]
        if rows[0].state is None:
            self._fill(rows)
        else:
            self._resume(rows)
        self.counts = WindowCounts(s)
        self.precounted = 0  # tokens that `extend` has counted; the next `maintain` must not count them again
        self.uncounted = 0  # tokens that `append` has written since `counts` was brought up to date; 0 once frozen

    def _fill(self, rows: list[Kept]) -> None:
        s, group = self.slots, self.spec.group
        # the numbers of all heads, fetched at once, because each fetch waits for the device
        numbers = torch.stack((s.cursor, s.pinned, s.n_flushed), -1).tolist()
        for b, r in enumerate(rows):
            for heads, (n, pinned, flushed) in _runs(numbers[b], max(1, ENCODED_AT_ONCE // r.k.shape[2])):
                start, in_groups = min(n, pinned), flushed * group
                end = start + in_groups
                for mine, x in ((self.k, r.k), (self.v, r.v)):
                    mine[b, heads, :start] = x[0, heads, :start]
                    mine[b, heads, start : n - in_groups] = x[0, heads, end:n]
                if flushed:
                    k, v = (x[0, heads, start:end].unflatten(1, (flushed, group)) for x in (r.k, r.v))
                    for planes, new in zip(self.groups, self.spec.encode(k, v, self.ctx), strict=True):
                        for plane, x in zip(planes, new, strict=True):
                            plane[b, heads, :flushed] = x

    def _resume(self, rows: list[Kept]) -> None:
        """Hold what another store of this kind wrote, without rounding again."""
        s = self.slots
        for b, r in enumerate(rows):
            state = r.state
            s.cursor[b], s.n_flushed[b] = state.cursor[0], state.n_flushed[0]
            n = min(state.k.shape[2], s.n_exact)  # less than n_exact only if the saved row had no groups
            for mine, old in ((self.k, state.k), (self.v, state.v)):
                mine[b, :, :n] = old[0, :, :n]
            m = min(state.k_groups[0].shape[2], self.n_groups)
            for planes, old in zip(self.groups, (state.k_groups, state.v_groups), strict=True):
                for plane, x in zip(planes, old, strict=True):
                    plane[b, :, :m] = x[0, :, :m]
            m *= self.spec.group
            behind = state.k.shape[2]
            s.pos[b] = -1
            s.pos[b, :, :n] = state.pos[0, :, :n]
            s.pos[b, :, s.n_exact : s.n_exact + m] = state.pos[0, :, behind : behind + m]
        s.note_flushed()

    def reserve(self, room: int) -> bool:
        return False

    def refill(self, rows: list[Kept], room: int) -> bool:
        return False

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.slots
        if not s.frozen:
            self.uncounted += k.shape[2]
        if s.uniform and not s.wraps and k.shape[2] == 1:  # the host knows the slot
            n = self.counts.reach
            self.k[:, :, n : n + 1], self.v[:, :, n : n + 1] = k, v
            s.record_at(n, pos)
            return
        if k.shape[2] == 1:
            index = s.take(pos, self.ctx.ops.take_slots)
        else:
            index = s.flat_index(s.next_slots(k.shape[2]))
            s.record(index, pos)
        # `self.k` and `self.v` have the exact slots only, so each head's begin earlier than in the list of all slots
        index = index.view(*s.cursor.shape, -1) - s.skipped
        self.ctx.ops.append(k, v, index.flatten(), self.k, self.v)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        a, T = 0, k.shape[2]
        while a < T:
            step = min(self.counts.free, self.slots.distinct_writes, T - a)
            self.append(k[:, :, a : a + step], v[:, :, a : a + step], pos[:, a : a + step])
            self._flush(step)
            a += step
        self.precounted += T

    def maintain(self, written: int) -> None:
        """Count tokens and flush the groups that are due. `extend` has done so for its own tokens."""
        written, self.precounted = written - self.precounted, 0
        if written:
            self._flush(written)

    def freeze(self) -> None:
        self.slots.freeze()

    def _flush(self, written: int) -> None:
        """Count `written` tokens. In each window that is full, encode the first group and move it behind the window."""
        s, group = self.slots, self.spec.group
        self.counts.written += written
        self.uncounted = 0
        if self.counts.free > 0:
            return
        due, into, first = self.counts.take_full()
        index, heads = torch.tensor([due, into, first], device=s.cursor.device), s.cursor.shape[1]
        b, h, to = index[0] // heads, index[0] % heads, index[1]
        window = index[2][:, None] + torch.arange(s.residual + group, device=index.device)  # (n,residual+group)
        slots = b[:, None], h[:, None], window
        k, v, pos = self.k[slots], self.v[slots], s.pos[slots]  # copies
        encoded = self.spec.encode(k[:, :group], v[:, :group], self.ctx)
        for planes, new in zip(self.groups, encoded, strict=True):
            for plane, x in zip(planes, new, strict=True):
                plane[b, h, to] = x
        s.pos[:, :, s.n_exact :].unflatten(2, (-1, group))[b, h, to] = pos[:, :group]
        for mine, x, empty in ((self.k, k, 0), (self.v, v, 0), (s.pos, pos, -1)):
            mine[slots] = torch.cat((x[:, group:], torch.full_like(x[:, :group], empty)), 1)
        s.n_flushed[b, h] += 1
        s.note_flushed()

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        s = self.slots
        n = s.n_exact if s.frozen else self.counts.reach + self.uncounted
        groups = self.n_groups if s.frozen else min(self.n_groups, max(self.counts.n_flushed))
        end = s.n_exact + groups * self.spec.group
        exact_held, groups_held = self._held(n, end)
        m = 0 if q_sink is None else min(s.n_sink, n)
        parts = [self._attend(q_sink, pos, *self._exact(0, m, part_of(exact_held, 0, m)))] if m else []
        exact = self._exact(m, n, part_of(exact_held, m, n) if m else exact_held)
        if groups:
            k, v = ([x[:, :, :groups] for x in planes] for planes in self.groups)
            key_pos, beside = s.pos[:, :, s.n_exact : end], exact if m < n else None
            parts.append(self.spec.attend(self.ctx.ops, q, k, v, groups_held, key_pos, pos, s.sliding_window, beside))
        elif m < n:
            parts.append(self._attend(q, pos, *exact))
        return *(merge(parts) if len(parts) > 1 else parts[0]), None

    def _held(self, n: int, end: int) -> tuple[Tensor | None, Tensor | None]:
        """Which of the first n slots, which are exact, and which slots of groups before `end` hold a token. Each is
        what `decode` in kernels/reference.py takes as `length`.
        """
        s = self.slots
        if s.wraps:  # any slot of a ring may be empty
            holds = s.pos >= 0
            return holds[:, :, :n], holds[:, :, s.n_exact : end]
        return (None, None) if s.uniform else (s.cursor - s.in_groups, s.in_groups)

    def _exact(self, a: int, b: int, held: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The exact slots a … b−1: keys, values, which of them hold a token, and positions."""
        span = slice(a, b)
        return self.k[:, :, span], self.v[:, :, span], held, self.slots.pos[:, :, span]

    def _attend(
        self, q: Tensor, pos: Tensor, k: Tensor, v: Tensor, length: Tensor | None, key_pos: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.ctx.ops.decode(q, k, v, length, key_pos, pos, self.slots.sliding_window)[:2]

    def unpack(self) -> list[Kept]:
        grouped = self.spec.decode(self.ctx.ops, *self.groups)
        decoded = [
            torch.cat((exact, x.to(self.ctx.dtype).flatten(2, 3)), 2).flatten(0, 2)
            for exact, x in zip((self.k, self.v), grouped, strict=True)
        ]
        found, _ = self.slots.unpack(*decoded)
        return [r.with_state(self._state(b)) for b, r in enumerate(found)]

    def _state(self, b: int) -> GroupState:
        row = slice(b, b + 1)
        fields = (x[row].clone() for x in (self.k, self.v, self.slots.pos, self.slots.cursor, self.slots.n_flushed))
        planes = (tuple(x[row].clone() for x in half) for half in self.groups)
        return GroupState(*fields, self.slots.pinned[row].clone(), *planes)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, *self.groups[0], *self.groups[1], *self.slots.tensors()]

    def host_tensors(self) -> list[Tensor]:
        return []

    @property
    def length(self) -> Tensor:
        return self.slots.length

    def used_bytes(self) -> tuple[int, int, int]:
        s, exact, grouped, sizes = self.slots, self.counts.exact_tokens, self.counts.groups_in_memory, []
        for x, planes in zip((self.k, self.v), self.groups, strict=True):
            per_group = sum(plane.nbytes for plane in planes) // max(1, planes[0].shape[:3].numel())
            sizes.append(exact * x.shape[3] * x.itemsize + grouped * per_group)
        return *sizes, sum(t.nbytes for t in s.tensors()) - 4 * (s.total - exact - grouped * self.spec.group)
