"""The bookkeeping of every store: which slot of which head holds the token at which position, and where the next one goes.

Knows no method; holds no key and no value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanokv.cache.kept import Kept


class Slots:
    """Static slots per (row, KV head), valid ones always the prefix [0, length).

    Slot order means nothing; `pos` says when. Everything that differs between rows, heads or steps is a tensor here;
    `bound` and `even` are what the host knows, so that the eager path may slice instead of mask. All heads have the slots of the
    largest one, or, `ragged`, each its own number of them, one head's behind the other's.
    """

    def __init__(self, rows: Sequence[Kept], room: int, sliding_window: int | None, ragged: bool = False):
        self.ragged, self.sliding_window, self.frozen = ragged, sliding_window, False
        length, wanted, sink, limit = self._measure(rows, room)
        self.cursor, self.wanted, self.sink, self.limit = length, wanted, sink, limit  # cursor: tokens ever written
        size = limit if ragged else torch.full_like(limit, self._size())
        self.first = (
            size.flatten().cumsum(0).view_as(size)[..., None] - size[..., None]
        )  # int64, as torch wants an index
        self.total = int(size.sum())
        self.flat_pos = length.new_full((self.total,), -1)
        self.flat_votes: Tensor | None = None  # fp32, only under a policy that keeps votes
        if rows[0].votes is not None:
            spare = 1 if ragged else 0  # takes what `votes` writes for slots that a head does not have
            self.flat_votes = self.flat_pos.new_zeros(self.total + spare, dtype=torch.float32)
        self._fill(rows)

    def _size(self) -> int:
        """How many slots each head gets where all get the same number."""
        return int(self.limit.max())

    def _where(self, b: int, n: int) -> Tensor:
        """(Hkv,n): in which slots row b's first n tokens lie, in the order in which they were written."""
        return torch.arange(n, device=self.first.device).expand(self.first.shape[1], -1)

    def _measure(self, rows: Sequence[Kept], room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """length, limit as the policy gave it (−1 grows), sink, and the slots a head really gets: (B,Hkv) each."""
        length, wanted, sink = (torch.cat([getattr(r, f) for r in rows]) for f in ("length", "limit", "sink"))
        limit = torch.where(wanted < 0, length + room, wanted)
        # a ring takes no more slots than there can be tokens; `reserve` packs anew, from `wanted`
        limit = torch.minimum(limit, torch.maximum(length + room, sink + 1))
        if self.sliding_window is not None:  # a slot behind the sinks is out of the window by the time its turn comes
            limit = torch.minimum(limit, sink + self.sliding_window)
        return length, wanted, sink, limit

    def _fill(self, rows: Sequence[Kept]) -> None:
        self.most = int(self.limit.max())  # slots of the largest head
        self.capacity = self.most if self.ragged else self.total // self.cursor.numel()
        for b, r in enumerate(rows):
            n = r.pos.shape[2]
            real = torch.arange(n, device=r.pos.device) < r.length[0, :, None]
            row = (self.first[b] + self._where(b, n))[real]
            self.flat_pos[row] = r.pos[0][real]
            if self.flat_votes is not None:
                self.flat_votes[row] = r.votes[0][real]
        self.span = int((self.limit - self.sink).min())  # tokens that surely land in distinct slots
        self.bound = self.written = int(self.cursor.max())
        self.even = not self.ragged and all(bool((x == x[0, 0]).all()) for x in (self.cursor, self.limit, self.sink))
        self.protected = int(self.sink.max())  # of every head, where `even`
        # whether some head overwrites what it holds, sooner or later
        self.turns = self.sliding_window is not None or bool((self.wanted >= 0).any())
        if self.frozen:
            self.freeze()

    def refill(self, rows: Sequence[Kept], room: int) -> bool:
        """Hold these rows instead, in the same memory. False, and nothing done, if they do not fit in it."""
        length, wanted, sink, limit = self._measure(rows, room)
        if (int(limit.sum()) if self.ragged else int(limit.max()) * limit.numel()) > self.total:
            return False
        for mine, new in ((self.cursor, length), (self.wanted, wanted), (self.sink, sink), (self.limit, limit)):
            mine.copy_(new)
        if self.ragged:
            self.first.copy_(limit.flatten().cumsum(0).view_as(limit)[..., None] - limit[..., None])
        self.flat_pos.fill_(-1)
        if self.flat_votes is not None:
            self.flat_votes.zero_()
        self._fill(rows)
        return True

    @property
    def pos(self) -> Tensor:
        """(B,Hkv,S) int32: what each slot holds, −1 never written or not of this head."""
        return self.wide(self.flat_pos, -1)

    @property
    def votes(self) -> Tensor:
        """(B,Hkv,S) fp32."""
        return self.wide(self.flat_votes, 0)

    @votes.setter
    def votes(self, new: Tensor) -> None:
        """new (B,Hkv,n), of the first n slots."""
        n = new.shape[2]
        if not self.ragged:
            self.votes[:, :, :n] = new
            return
        at, mine = self._rows(n)
        self.flat_votes.index_copy_(0, at.masked_fill(~mine, self.total).flatten(), new.flatten())

    def wide(self, flat: Tensor, empty: float) -> Tensor:
        """A column with an entry per slot as (B,Hkv,S): a view, or, ragged, a copy with `empty` behind each head's own slots."""
        if not self.ragged:
            return flat.view(*self.cursor.shape, -1)
        at, mine = self._rows(self.capacity)
        return flat[at.clamp(max=self.total - 1)].masked_fill(~mine, empty)

    def _rows(self, n: int) -> tuple[Tensor, Tensor]:
        """(B,Hkv,n): where each head's first n slots lie, and which of them it has."""
        at = torch.arange(n, device=self.first.device)
        return self.first + at, at < self.limit[..., None]

    @property
    def length(self) -> Tensor:
        """(B,Hkv) int32: how many slots are valid."""
        return torch.minimum(self.cursor, self.limit)

    def ring(self, n: int) -> Tensor:
        """(B,Hkv,n): the default rule. Fill up to the limit, then overwrite the oldest behind the sinks."""
        at = self.cursor[..., None] + torch.arange(n, dtype=torch.int32, device=self.cursor.device)
        sink, limit = self.sink[..., None], self.limit[..., None]
        # the `where` matters: with fewer tokens than sinks, the bare modulo would write to a wrong slot
        return torch.where(at < limit, at, sink + (at - sink) % (limit - sink).clamp(min=1))

    def weakest(self, worth: Tensor, now: Tensor) -> Tensor:
        """(B,Hkv,1): a free slot, or else that of least worth (B,Hkv,S), the oldest of equals.

        What the model's own window hides from the token at now (B,1) goes first.
        """
        pos = self.pos
        if self.sliding_window is not None:
            worth = worth.masked_fill(pos <= now[:, None] - self.sliding_window, -torch.inf)
        worth = worth.masked_fill(pos < 0, torch.inf)
        safe = (worth > worth.amin(-1, keepdim=True)) | (pos < 0)
        oldest = pos.masked_fill(safe, torch.iinfo(torch.int32).max).argmin(-1)
        return torch.where(self.cursor < self.limit, self.cursor, oldest.to(torch.int32))[..., None]

    def unpack(self, k: Tensor, v: Tensor, codes: Mapping[str, Tensor] | None = None) -> list[Kept]:
        """Keys, values and codes as the store has them, (slots,·) by `flat` row, as a value per row of the batch, in temporal order."""
        rows, pos, votes = [], self.pos, None if self.flat_votes is None else self.votes
        for b, n in enumerate(self.length):
            real = torch.arange(int(n.max()), device=n.device) < n[:, None]  # (Hkv,N)
            at = pos[b].masked_fill(pos[b] < 0, torch.iinfo(torch.int32).max).argsort(-1)[:, : real.shape[1]]
            row = (at + self.first[b]).masked_fill(~real, 0)
            held = None if votes is None else votes[b].gather(1, at)[None]
            when = pos[b].gather(1, at).masked_fill(~real, -1)
            wanted, sink = self.wanted[b : b + 1].clone(), self.sink[b : b + 1].clone()
            mine = None if codes is None else {name: x[row][None] for name, x in codes.items()}
            here = when[None], n[None].clone(), wanted, sink
            rows.append(Kept(k[row][None], v[row][None], *here, votes=held, codes=mine))
        return rows

    def host_ring(self) -> int:
        """`ring` for one token, as the host knows it where `even`."""
        cursor, sink = self.written, self.protected
        return cursor if cursor < self.most else sink + (cursor - sink) % (self.most - sink)

    def flat(self, at: Tensor) -> Tensor:
        """Slots (B,Hkv,T) as rows of a store seen as (slots, ·): int64 (B·Hkv·T,)."""
        return (at + self.first).flatten()

    def place(self, row: Tensor, pos: Tensor) -> None:
        """Note that the slots `row`, as `flat` gives them, now hold the tokens at pos (B,T)."""
        B, T = pos.shape
        when = pos[:, None].expand(B, self.cursor.shape[1], T)
        self.flat_pos.index_copy_(0, row, when.flatten().to(torch.int32))
        if self.flat_votes is not None:
            self.flat_votes.index_fill_(0, row, 0.0)
        self._count(T)

    def place_at(self, at: int, pos: Tensor) -> None:
        """`place` for one token that takes the same slot in every head."""
        self.pos[:, :, at] = pos
        if self.flat_votes is not None:
            self.votes[:, :, at] = 0
        self._count(1)

    def add(self, at: Tensor, pos: Tensor, real: Tensor) -> None:
        """Note that the slots at (B,Hkv,T) hold the tokens at pos (B,Hkv,T), of each head only the first `real`."""
        self.flat_pos.index_copy_(0, self.flat(at), torch.where(real, pos, -1).flatten().to(torch.int32))
        self.cursor += real.sum(-1, dtype=torch.int32)
        if not self.frozen:
            self.bound = min(self.bound + pos.shape[2], self.most)

    def _count(self, n: int) -> None:
        self.cursor += n
        if self.frozen:
            return
        if self.even:  # a number that grows each step would recompile a compiled step, which is never `even`
            self.written += n
        self.bound = min(self.bound + n, self.most)

    def freeze(self) -> None:
        """From now on the host promises nothing: shapes stay at capacity, as a compiled or captured step needs."""
        self.bound, self.even, self.frozen = self.capacity, False, True

    def tensors(self) -> list[Tensor]:
        kept = [self.cursor, self.limit, self.wanted, self.sink, self.first, self.flat_pos]
        return kept if self.flat_votes is None else [*kept, self.flat_votes]
