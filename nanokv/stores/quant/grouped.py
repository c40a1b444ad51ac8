"""Groups of tokens that share scales, behind a window of exact ones: the memory and the schedule of every store of that kind."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


class GroupSlots(Slots):
    """Slots in memory: `pin` tokens and the residual window, exact, then whole groups.

    A head's tokens count from 0 as they are written. The first `pin` stay where they are. The others enter the window, and whenever it
    holds residual + group of them its first `group` move behind it and the rest closes up: `moved` groups so far, of which a head that
    grows has them all and one with a limit a ring of `laps`. Where a token that the policy's ring has let go lies, pos is −1.
    """

    def __init__(self, rows: list[Kept], room: int, sliding_window: int | None, pin: int, group: int, residual: int):
        self.group, self.residual = group, residual
        codes = rows[0].codes  # as another store of this kind divided its slots
        self.least = (pin, 0) if codes is None else (int(codes["pin"]), codes["k"].shape[2])
        self.room = room
        super().__init__(rows, room, sliding_window)

    def _size(self) -> int:
        """Also fixes how the slots are divided."""
        self.pin = max(self.least[0], int(self.sink.max()))  # sinks stay, and a ring of groups cannot let them
        wraps = (self.limit < self.cursor + self.room) | (self.limit == self.wanted)
        if self.sliding_window is not None:
            wraps |= self.limit == self.sink + self.sliding_window
        self.wraps = bool(wraps.any())
        self.near = self.pin + self.residual + self.group
        if not self.wraps:  # a text that never fills the window needs no more than its own length
            self.near = max(min(self.near, int(self.limit.max())), self.least[1])
        grows = (self.limit - self.pin - self.residual).div(self.group, rounding_mode="floor").clamp(min=0)
        ring = -(self.sink + self.residual - self.limit).div(self.group, rounding_mode="floor")
        self.laps = torch.where(wraps, ring.clamp(min=1), grows)
        self.moved = (self.cursor - self.pin - self.residual).div(self.group, rounding_mode="floor").clamp(min=0)
        return self.near + int(self.laps.max()) * self.group

    def _where(self, b: int, n: int) -> Tensor:
        return self.place_of(torch.arange(n, device=self.cursor.device).expand(1, self.cursor.shape[1], n), b)[0]

    def place_of(self, nth: Tensor, b: int | None = None) -> Tensor:
        """(B,Hkv,n): in which slots the nth tokens (B,Hkv,n) lie; b: of this row alone."""
        rows = slice(None) if b is None else slice(b, b + 1)
        moved, laps = self.moved[rows, :, None], self.laps[rows, :, None].clamp(min=1)
        behind = nth - self.pin
        ring = self.near + (behind.div(self.group, rounding_mode="floor") % laps) * self.group + behind % self.group
        near = torch.where(behind < 0, nth, nth - moved * self.group)
        return torch.where((behind >= 0) & (behind < moved * self.group), ring, near)

    def ring(self, n: int) -> Tensor:
        """(B,Hkv,n): the next free slots of the window."""
        nth = self.cursor[..., None] + torch.arange(n, dtype=torch.int32, device=self.cursor.device)
        return nth - self.moved[..., None] * self.group

    def place(self, row: Tensor, pos: Tensor) -> None:
        if self.wraps:  # each new token of a full ring ends an old one
            nth = self.cursor[..., None] + torch.arange(pos.shape[1], device=pos.device)
            full = nth >= self.limit[..., None]
            gone = torch.where(full, self.place_of(nth - (self.limit - self.sink)[..., None]), self.ring(pos.shape[1]))
            self.flat_pos.index_fill_(0, self.flat(gone), -1)
        super().place(row, pos)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self.moved, self.laps]


class GroupedStore:
    """Words, scales and zeros of whole groups; K and V of the rest as they came. The host counts tokens, so nothing waits to be asked."""

    exact: int | None = 0

    waits = False

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec):
        self.policy, self.ctx, self.spec = policy, ctx, spec
        pin, group = spec.pin, spec.group
        self.slots = s = GroupSlots(rows, room, ctx.config.sliding_window, pin, group, spec.residual)
        n, heads, dim = len(rows), ctx.config.num_key_value_heads, ctx.config.head_dim
        self.k, self.v = (ctx.empty(n, heads, s.near, dim).zero_() for _ in range(2))
        self.groups = (s.total // s.cursor.numel() - s.near) // group
        blank = ctx.empty(n, heads, 1, group, dim).zero_()
        self.body = [
            [x.expand(-1, -1, self.groups, -1, -1).clone() for x in half] for half in self._encode(blank, blank)
        ]
        if rows[0].codes is None:
            self._fill(rows)
        else:
            self._resume(rows)
        self.since = 0  # tokens in each window that `count` has yet to be told of: it is only brought up to date when a group is due
        self.ahead = 0  # tokens that `maintain` has yet to be told of and `extend` has counted
        # the host knows of each (row, head): tokens in its window, groups behind it, groups it has memory for
        self.count = (s.cursor - s.pin - s.moved * group).flatten().tolist()
        self.moved, self.laps = s.moved.flatten().tolist(), s.laps.flatten().tolist()
        self._bound()

    def _encode(self, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """K and V (…,group,D) → words (…,group,·), and scale and zero, of K (…,1,D), of V (…,group,runs)."""
        quantize, spec = self.ctx.ops.quantize, self.spec
        return quantize(k, spec.k, spec.group, 1), quantize(v, spec.v, 1, spec.channels(k.shape[-1]))

    def _fill(self, rows: list[Kept]) -> None:
        s, group = self.slots, self.spec.group
        for b, r in enumerate(rows):
            at = s._where(b, r.k.shape[2])  # (Hkv,N)
            for h in range(at.shape[0]):
                n, moved = int(r.length[0, h]), int(s.moved[b, h])
                near = at[h, :n] < s.near
                for mine, x in ((self.k, r.k), (self.v, r.v)):
                    mine[b, h, at[h, :n][near]] = x[0, h, :n][near].to(mine.dtype)
                k, v = (x[0, h, s.pin : s.pin + moved * group].unflatten(0, (moved, group)) for x in (r.k, r.v))
                if moved:
                    for mine, new in zip(self.body, self._encode(k, v), strict=True):
                        for plane, x in zip(mine, new, strict=True):
                            plane[b, h, :moved] = x

    def _resume(self, rows: list[Kept]) -> None:
        """Go on from what another store of this kind wrote, as it is."""
        s = self.slots
        for b, r in enumerate(rows):
            c = r.codes
            for name in ("cursor", "moved"):
                getattr(s, name)[b] = c[name][0]
            n = min(c["k"].shape[2], s.near)  # less than a window only where there are no groups yet
            for mine, old in ((self.k, c["k"]), (self.v, c["v"])):
                mine[b, :, :n] = old[0, :, :n]
            m = min(c["k0"].shape[2], self.groups)
            for name, half in zip("kv", self.body, strict=True):
                for i, plane in enumerate(half):
                    plane[b, :, :m] = c[f"{name}{i}"][0, :, :m]
            s.pos[b] = -1
            s.pos[b, :, :n] = c["pos"][0, :, :n]
            m *= self.spec.group
            s.pos[b, :, s.near : s.near + m] = c["pos"][0, :, c["k"].shape[2] : c["k"].shape[2] + m]

    def reserve(self, room: int) -> bool:
        return False

    def refill(self, rows: list[Kept], room: int) -> bool:
        return False

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.slots
        if s.even and not s.wraps and k.shape[2] == 1:  # the host knows the slot
            self.k[:, :, self.filled : self.filled + 1], self.v[:, :, self.filled : self.filled + 1] = k, v
            s.place_at(self.filled, pos)
            return
        row = s.ring(k.shape[2])
        at = (row + torch.arange(s.cursor.numel(), device=row.device).view_as(s.cursor)[..., None] * s.near).flatten()
        self.ctx.ops.append(k, v, at, self.k, self.v)
        s.place(s.flat(row), pos)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        a, T = 0, k.shape[2]
        while a < T:
            free = self.spec.residual + self.spec.group - (self.filled - self.slots.pin)
            step = min(free, self.slots.span, T - a)
            self.append(k[:, :, a : a + step], v[:, :, a : a + step], pos[:, a : a + step])
            self._flush(step)
            a += step
        self.ahead += T

    def maintain(self, written: int) -> None:
        """Count; move what is due. `extend` has seen to its own tokens already."""
        written, self.ahead = written - self.ahead, 0
        if written:
            self._flush(written)

    def freeze(self) -> None:
        self.slots.freeze()

    def _flush(self, written: int) -> None:
        s, group, residual = self.slots, self.spec.group, self.spec.residual
        self.since += written
        self.filled += written
        if self.filled - s.pin < residual + group:  # not even the fullest window: nothing to do, head by head
            return
        self.count, self.since = [n + self.since for n in self.count], 0
        due = [i for i, n in enumerate(self.count) if n >= residual + group]
        into = [self.moved[i] % self.laps[i] for i in due]
        for i in due:
            self.count[i] -= group
            self.moved[i] += 1
        self._bound()
        at, heads = torch.tensor([due, into], device=s.cursor.device), s.cursor.shape[1]
        b, h, at = at[0] // heads, at[0] % heads, at[1]
        first, rest = slice(s.pin, s.pin + group), slice(s.pin + group, s.near)
        k, v = self.k[b, h], self.v[b, h]  # copies (n,near,D)
        for mine, new in zip(self.body, self._encode(k[:, first], v[:, first]), strict=True):
            for plane, x in zip(mine, new, strict=True):
                plane[b, h, at] = x
        pos = s.pos[b, h]
        s.pos[:, :, s.near :].unflatten(2, (-1, group))[b, h, at] = pos[:, first]
        for mine, x, empty in ((self.k, k, 0), (self.v, v, 0), (s.pos, pos, -1)):
            mine[b, h, s.pin : s.pin + residual] = x[:, rest]
            mine[b, h, s.pin + residual : s.near] = empty
        s.moved[b, h] += 1

    def _bound(self) -> None:
        """How far any head reaches: exact slots, and groups."""
        self.filled = self.slots.pin + max(self.count)
        self.used = min(self.groups, max(self.moved))

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        s = self.slots
        n = s.near if s.frozen else self.filled + (1 if q.shape[2] == 1 else 0)  # a single token is in already
        groups = self.groups if s.frozen else self.used
        m = 0 if near is None else min(s.protected, n)
        parts = [self._decode(near, pos, *self._exact(0, m))] if m else []
        exact = self._exact(m, n)
        if groups:
            k, v = ([x[:, :, :groups].flatten(2, 3) for x in half] for half in self.body)
            span = slice(s.near, s.near + groups * self.spec.group)
            seen, kpos, bits = self._held(span), s.pos[:, :, span], (self.spec.k, self.spec.v)
            parts.append(
                self.ctx.ops.decode_quant(q, k, v, seen, kpos, pos, s.sliding_window, bits, exact if m < n else None)
            )
        elif m < n:
            parts.append(self._decode(q, pos, *exact))
        return *(merge(parts) if len(parts) > 1 else parts[0]), None

    def _exact(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Keys, values, which of them are there, and their positions, of the exact slots a … b−1."""
        span = slice(a, b)
        return self.k[:, :, span], self.v[:, :, span], self._held(span), self.slots.pos[:, :, span]

    def _decode(
        self, q: Tensor, pos: Tensor, k: Tensor, v: Tensor, held: Tensor | None, kpos: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.ctx.ops.decode(q, k, v, held, kpos, pos, self.slots.sliding_window)[:2]

    def _held(self, span: slice) -> Tensor | None:
        """bool (B,Hkv,n): which of these slots hold a token; None where all do."""
        s = self.slots
        return None if s.even and not s.wraps else s.pos[:, :, span] >= 0

    def unpack(self) -> list[Kept]:
        s, dequantize = self.slots, self.ctx.ops.dequantize
        bits, dtype = (self.spec.k, self.spec.v), self.ctx.dtype
        whole = []
        for near, half, b in zip((self.k, self.v), self.body, bits, strict=True):
            far = dequantize(*half, b).to(dtype).flatten(2, 3)
            whole.append(torch.cat((near, far), 2).flatten(0, 2))
        rows = s.unpack(*whole)
        for b, row in enumerate(rows):
            mine = slice(b, b + 1)
            codes = {"k": self.k[mine], "v": self.v[mine], "pos": s.pos[mine]}
            codes |= {"cursor": s.cursor[mine], "moved": s.moved[mine], "pin": torch.tensor(s.pin)}
            codes |= {
                f"{name}{i}": x[mine] for name, half in zip("kv", self.body, strict=True) for i, x in enumerate(half)
            }
            rows[b] = replace(row, codes={name: x.clone() for name, x in codes.items()})
        return rows

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, *self.body[0], *self.body[1], *self.slots.tensors()]

    def hosted(self) -> list[Tensor]:
        return []

    @property
    def length(self) -> Tensor:
        return self.slots.length

    def live(self) -> tuple[int, int, int]:
        s, group = self.slots, self.spec.group
        near, far = sum(n + self.since + s.pin for n in self.count), sum(map(min, self.moved, self.laps))
        sizes = []
        for exact, half in zip((self.k, self.v), self.body, strict=True):
            one = sum(x.nbytes for x in half) // max(1, half[0].shape[:3].numel())  # bytes of a group of one head
            sizes.append(near * exact.shape[3] * exact.itemsize + far * one)
        return *sizes, sum(t.nbytes for t in s.tensors()) - 4 * (s.total - near - far * group)
