"""The bookkeeping of every store: which slot of which head holds the token at which position, and where the next one
goes.

It knows no method and holds no key and no value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanokv.cache.kept import Kept


class Slots:
    """Every (row, KV head) has a fixed number of slots, and its valid slots are the first `length` ones.

    Tokens lie in them in no particular order: `pos` says which token each slot holds. `GroupSlots` differs: its valid
    slots are not the first ones, and each slot has its place in the order. Numbers that differ between rows, heads or
    steps are tensors. The host also knows `max_used` and `uniform`, so plain calls can slice instead of mask. All
    heads have as many slots as the head that needs most. If `ragged`, each head has only the slots that it needs, and
    the next head's slots begin where they end.
    """

    def __init__(self, rows: Sequence[Kept], room: int, sliding_window: int | None, ragged: bool = False):
        self.ragged, self.sliding_window, self.frozen = ragged, sliding_window, False
        length, asked_limit, sink, limit = self._measure(rows, room)
        self.cursor = length  # tokens counted so far: those it was filled with and all later ones
        self.asked_limit, self.sink, self.limit = asked_limit, sink, limit
        size = limit if ragged else torch.full_like(limit, self._lay_out())
        ends = size.flatten().cumsum(0).view_as(size)
        self.first_index = ends[..., None] - size[..., None]  # (B,Hkv,1) int64: where each head's slots begin
        self.total = int(size.sum())
        self.flat_pos = length.new_full((self.total,), -1)
        self.flat_scores: Tensor | None = None  # fp32, only under a policy that scores decode steps
        if rows[0].running_scores is not None:
            # one spare entry takes what `set_running_scores` writes for slots that a head does not have
            spare = 1 if ragged else 0
            self.flat_scores = self.flat_pos.new_zeros(self.total + spare, dtype=torch.float32)
        self._fill(rows)

    def _lay_out(self) -> int:
        """How many slots each head gets where all get the same number. A subclass sets here what each slot is for."""
        return int(self.limit.max())

    def _slots_of(self, b: int, n: int) -> Tensor:
        """(Hkv,n): the slots of row b's first n tokens, in the order in which they were written."""
        return torch.arange(n, device=self.first_index.device).expand(self.first_index.shape[1], -1)

    def _measure(self, rows: Sequence[Kept], room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B,Hkv) each: length, the limit that the policy asked for (−1: grows), sinks, and how many tokens a
        head holds here at most.
        """
        length, asked, sink = (torch.cat([getattr(r, f) for r in rows]) for f in ("length", "limit", "sink"))
        limit = torch.where(asked < 0, length + room, asked)
        # a ring gets no slots that would stay empty; when `reserve` packs it again, it may grow to the asked limit
        limit = torch.minimum(limit, torch.maximum(length + room, sink + 1))
        if self.sliding_window is not None:  # a ring this long overwrites only tokens outside the window
            limit = torch.minimum(limit, sink + self.sliding_window)
        return length, asked, sink, limit

    def _fill(self, rows: Sequence[Kept]) -> None:
        # the numbers of all rows' heads, fetched at once, because each fetch waits for the device
        cursor, limit, sink = torch.stack((self.cursor, self.limit, self.sink)).flatten(1).tolist()
        self.largest_head = max(limit)  # tokens
        self.capacity = self.largest_head if self.ragged else self.total // len(cursor)
        for b, r in enumerate(rows):
            heads, n = r.pos.shape[1:]
            index, pos, scores = self.first_index[b] + self._slots_of(b, n), r.pos[0], r.running_scores
            if min(cursor[b * heads : (b + 1) * heads]) < n:
                valid = torch.arange(n, device=pos.device) < r.length[0, :, None]
                index, pos = index[valid], pos[valid]
                scores = None if scores is None else scores[:, valid]
            self.flat_pos[index] = pos
            if self.flat_scores is not None:
                self.flat_scores[index] = scores[0]
        # this many consecutive tokens never share a slot
        self.distinct_writes = min(a - b for a, b in zip(limit, sink, strict=True))
        self.max_used = max(cursor)  # how many slots a read must cover; once frozen: all
        self.host_cursor = self.max_used
        same = (min(x) == max(x) for x in (cursor, limit, sink))
        self.uniform = not self.ragged and all(same)  # all heads hold equally many tokens, and the host knows how many
        self.n_sink = max(sink)  # the largest sink count of any head; if `uniform`, that of every head
        if self.frozen:
            self.freeze()

    def refill(self, rows: Sequence[Kept], room: int) -> bool:
        """Hold these rows instead, in the same memory. False, and nothing done, if they do not fit."""
        length, asked, sink, limit = self._measure(rows, room)
        if (int(limit.sum()) if self.ragged else int(limit.max()) * limit.numel()) > self.total:
            return False
        for mine, new in ((self.cursor, length), (self.asked_limit, asked), (self.sink, sink), (self.limit, limit)):
            mine.copy_(new)
        if self.ragged:
            self.first_index.copy_(limit.flatten().cumsum(0).view_as(limit)[..., None] - limit[..., None])
        self.flat_pos.fill_(-1)
        if self.flat_scores is not None:
            self.flat_scores.zero_()
        self._fill(rows)
        return True

    @property
    def pos(self) -> Tensor:
        """(B,Hkv,S) int32: the position of the token in each slot; −1: the slot is empty, or not this head's."""
        return self.padded(self.flat_pos, -1)

    @property
    def running_scores(self) -> Tensor:
        """(B,Hkv,S) fp32: the number that the policy's `update_scores` last gave each slot."""
        return self.padded(self.flat_scores, 0)

    def set_running_scores(self, new: Tensor) -> None:
        """new (B,Hkv,n): scores of the first n slots.

        This is no setter of a property: torch 2.11 calls those behind a compiled graph, and a recorded step calls graphs
        alone.
        """
        n = new.shape[2]
        if not self.ragged:
            self.running_scores[:, :, :n] = new
            return
        index, mine = self._head_indices(n)
        self.flat_scores.index_copy_(0, index.masked_fill(~mine, self.total).flatten(), new.flatten())

    def padded(self, flat: Tensor, empty: float) -> Tensor:
        """A flat tensor with one entry per slot, seen as (B,Hkv,S). It is a view; if `ragged`, a copy with `empty` behind
        each head's own slots.
        """
        if not self.ragged:
            return flat.view(*self.cursor.shape, -1)
        index, mine = self._head_indices(self.capacity)
        return flat[index.clamp(max=self.total - 1)].masked_fill(~mine, empty)

    def _head_indices(self, n: int) -> tuple[Tensor, Tensor]:
        """(B,Hkv,n): the flat indices of each head's first n slots, and which of these slots the head has."""
        slot = torch.arange(n, device=self.first_index.device)
        return self.first_index + slot, slot < self.limit[..., None]

    @property
    def length(self) -> Tensor:
        """(B,Hkv) int32: how many slots are valid."""
        return torch.minimum(self.cursor, self.limit)

    @property
    def overwrites(self) -> Tensor:
        """(B,Hkv) bool: whether the head overwrites tokens when it is full."""
        return (self.asked_limit >= 0) | (self.sliding_window is not None)

    # ---- which slot a new token takes. `next_slots`, `next_slot_on_host` and `take` are one rule: on tensors, in Python
    # numbers, and as one operation that also notes what it gave; `take_lowest` is the rule of policies that evict by score

    def next_slots(self, n: int) -> Tensor:
        """(B,Hkv,n): the slots of the next n tokens. They fill up to the limit, then the oldest behind the sinks is overwritten."""
        slot = self.cursor[..., None] + torch.arange(n, dtype=torch.int32, device=self.cursor.device)
        sink, limit = self.sink[..., None], self.limit[..., None]
        # the `where` matters: with fewer tokens than sinks, the bare modulo would name a wrong slot
        return torch.where(slot < limit, slot, sink + (slot - sink) % (limit - sink).clamp(min=1))

    def next_slot_on_host(self) -> int:
        """`next_slots` for one token, computed on the host; heads must be uniform."""
        cursor, sink = self.host_cursor, self.n_sink
        return cursor if cursor < self.largest_head else sink + (cursor - sink) % (self.largest_head - sink)

    def take(self, pos: Tensor, take_slots: Callable[..., Tensor]) -> Tensor:
        """Give the new tokens at pos (B,1) their slots by the rule of `next_slots`, and note that they lie there → flat
        indices (B·Hkv,). `take_slots` is the backend's.
        """
        index = take_slots(self.cursor, self.limit, self.sink, self.first_index, pos, self.flat_pos)
        if self.flat_scores is not None:
            self.flat_scores.index_fill_(0, index, 0.0)
        self._count_on_host(1)
        return index

    def take_lowest(self, score: Tensor, pos: Tensor, take_lowest: Callable[..., tuple]) -> tuple[Tensor, Tensor]:
        """Give the new tokens at pos (B,1) a free slot each or else that of the lowest score (B,Hkv,S), and note that they
        lie there → flat indices (B·Hkv,), and the positions of the tokens that leave, −1 for none. `take_lowest` is the
        backend's.
        """
        given = self.cursor, self.limit, self.first_index, pos, self.flat_pos, self.sliding_window
        index, left = take_lowest(score, self.pos, *given)
        if self.flat_scores is not None:
            self.flat_scores.index_fill_(0, index, 0.0)
        self._count_on_host(1)
        return index, left

    def flat_index(self, slot: Tensor) -> Tensor:
        """Slots (B,Hkv,T) → int64 (B·Hkv·T,): their indices in the flat list of all rows' and heads' slots."""
        return (slot + self.first_index).flatten()

    def record(self, index: Tensor, pos: Tensor) -> None:
        """Note that the slots `index` (as `flat_index` gives them) now hold the tokens at pos (B,T)."""
        B, T = pos.shape
        when = pos[:, None].expand(B, self.cursor.shape[1], T)
        self.flat_pos.index_copy_(0, index, when.flatten().to(torch.int32))
        if self.flat_scores is not None:
            self.flat_scores.index_fill_(0, index, 0.0)
        self.cursor += T
        self._count_on_host(T)

    def record_at(self, slot: int, pos: Tensor) -> None:
        """`record` for one token that takes the same slot in every head."""
        self.pos[:, :, slot] = pos
        if self.flat_scores is not None:
            self.running_scores[:, :, slot] = 0
        self.cursor += 1
        self._count_on_host(1)

    def record_masked(self, slot: Tensor, pos: Tensor, valid: Tensor) -> None:
        """Note that the slots (B,Hkv,T) hold the tokens at pos (B,Hkv,T). valid (B,Hkv,T) bool: which of them are tokens; in
        each head these come first.
        """
        self.flat_pos.index_copy_(0, self.flat_index(slot), torch.where(valid, pos, -1).flatten().to(torch.int32))
        self.cursor += valid.sum(-1, dtype=torch.int32)
        if not self.frozen:
            self.max_used = min(self.max_used + pos.shape[2], self.largest_head)

    def _count_on_host(self, n: int) -> None:
        if self.frozen:
            return
        if self.uniform:  # only `next_slot_on_host` reads this number, and only while all heads are uniform
            self.host_cursor += n
        self.max_used = min(self.max_used + n, self.largest_head)

    def unpack(self, k: Tensor, v: Tensor) -> tuple[list[Kept], list[Tensor]]:
        """Keys and values (slots,D) in the store's order → one Kept per row in temporal order, and per row the flat
        index (Hkv,N) of each token's slot.
        """
        found, sources = [], []
        pos, scores = self.pos, None if self.flat_scores is None else self.running_scores
        for b, n in enumerate(self.length):
            valid = torch.arange(int(n.max()), device=n.device) < n[:, None]  # (Hkv,N)
            order = pos[b].masked_fill(pos[b] < 0, torch.iinfo(torch.int32).max).argsort(-1)[:, : valid.shape[1]]
            index = (order + self.first_index[b]).masked_fill(~valid, 0)
            found.append(
                Kept(
                    k[index][None],
                    v[index][None],
                    pos[b].gather(1, order).masked_fill(~valid, -1)[None],
                    n[None].clone(),
                    self.asked_limit[b : b + 1].clone(),
                    self.sink[b : b + 1].clone(),
                    running_scores=None if scores is None else scores[b].gather(1, order)[None],
                )
            )
            sources.append(index)
        return found, sources

    def freeze(self) -> None:
        """From now on shapes stay at capacity, as a compiled or captured step needs; the host knows no lengths any
        more.
        """
        self.max_used, self.uniform, self.frozen = self.capacity, False, True

    def tensors(self) -> list[Tensor]:
        kept = [self.cursor, self.limit, self.asked_limit, self.sink, self.first_index, self.flat_pos]
        return kept if self.flat_scores is None else [*kept, self.flat_scores]
