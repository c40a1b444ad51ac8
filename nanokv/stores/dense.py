"""Tokens in static slots (B,Hkv,S,·), each written down alone: as it is (`dense`, lossless), or as the codes of a store that rounds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context, StoreSpec
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy
from nanokv.stores.quant.codec import Codec

BOOKKEEPING = 4 * 4 + 8  # bytes per row and head: cursor, limit, wanted, sink, first


@dataclass(frozen=True, kw_only=True)
class Dense(StoreSpec):
    """K and V unquantised (the layout every engine has; no paper)."""

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        per_head = 2 * config.head_dim * dtype.itemsize + 4  # K, V and an int32 position
        return config.num_key_value_heads * per_head, config.num_key_value_heads * BOOKKEEPING

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> SlotStore:
        plain = Codec(ctx.config.head_dim, ctx.dtype)
        return SlotStore(rows, policy, room, ctx, (plain, plain))


@dataclass(frozen=True, kw_only=True)
class Rounding(StoreSpec):
    """A store that rounds each token alone, when it comes, and never again.

    pin: the first so many tokens held stay exact, as attention sinks suffer most (IntactKV, arXiv:2403.01241), but in heads that let
    them go; sinks that a policy never lets go are exact in any case.
    """

    pin: int = 0

    def __post_init__(self):
        if self.pin < 0:
            raise ValueError(f"pin={self.pin}; give how many of the first tokens stay exact, or 0")

    @abstractmethod
    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        """Of K and of V, for one layer that starts with these tokens."""

    @abstractmethod
    def widths(self, dim: int) -> tuple[float, float]:
        """Bytes per token and KV head of K and of V."""

    def refuses(self, keep: Policy) -> str:
        if self.pin and type(keep).slot is not Policy.slot:
            return "may let the first tokens go while decoding, so none stay exact: leave pin out"
        return super().refuses(keep)

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        pin = max(self.pin, sink)
        pinned = 2 * (pin + 1) * config.head_dim * dtype.itemsize if pin else 0
        heads = config.num_key_value_heads
        return heads * (sum(self.widths(config.head_dim)) + 4), heads * (BOOKKEEPING + pinned)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> SlotStore:
        return SlotStore(rows, policy, room, ctx, self.codecs(rows, ctx), self.pin)


class SlotStore:
    """Planes of K and V in slots. The first `pin` slots are held exactly as well, with a spare one that takes what goes elsewhere."""

    waits = False

    def __init__(
        self,
        rows: list[Kept],
        policy: Policy,
        room: int,
        ctx: Context,
        codecs: tuple[Codec, Codec],
        pin: int = 0,
    ):
        self.slots, self.policy, self.ctx = Slots(rows, room, ctx.config.sliding_window), policy, ctx
        self.default_rule = type(policy).slot is Policy.slot
        self.codecs, rounds = codecs, type(codecs[0]) is not Codec
        # behind its sinks a ring holds later and later tokens, not the first ones; nor does a slot that a policy may give away
        sinks = self.slots.protected if self.default_rule else 0
        first = sinks if self.slots.turns else max(pin, sinks)
        self.pin = min(first, self.slots.capacity) if rounds else 0
        self.exact = self.pin if rounds else None
        n, heads = len(rows), ctx.config.num_key_value_heads
        self.planes = [
            [self._plane(name, n, heads, self.slots.capacity, w, dtype=dtype) for w, dtype in codec.planes]
            for name, codec in zip("kv", codecs, strict=True)
        ]
        self.pinned = [ctx.empty(n, heads, self.pin + 1, ctx.config.head_dim) for _ in range(2 if self.pin else 0)]
        self._fill(rows)

    def _plane(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.ctx.empty(*shape, dtype=dtype)

    def _fill(self, rows: list[Kept]) -> None:
        for plane in (*self.planes[0], *self.planes[1], *self.pinned):
            plane.zero_()  # a masked slot must still be a number: 0 · NaN is NaN
        for b, r in enumerate(rows):
            n = r.k.shape[2]
            for name, x, planes, codec in zip("kv", (r.k, r.v), self.planes, self.codecs, strict=True):
                codes = (
                    codec.of_row(b).encode(x)
                    if r.codes is None
                    else [r.codes[f"{name}{i}"] for i in range(len(planes))]
                )
                for plane, code in zip(planes, codes, strict=True):
                    plane[b, :, :n] = code[0]
            for pinned, x in zip(self.pinned, (r.k, r.v), strict=False):
                m = min(n, self.pin)
                pinned[b, :, :m] = x[0, :, :m]

    def reserve(self, room: int) -> bool:
        return False

    def refill(self, rows: list[Kept], room: int) -> bool:
        if not self.slots.refill(rows, room):
            return False
        self._fill(rows)
        return True

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.slots
        if not (s.even and self.default_rule and k.shape[2] == 1):
            self.put(self.policy.slot(s, pos), k, v, pos)
            return
        at = s.host_ring()  # the host knows the slot: copies, no index arithmetic
        for plane, code in zip((*self.planes[0], *self.planes[1]), self._encode(k, v), strict=True):
            plane[:, :, at : at + 1] = code
        for pinned, x in zip(self.pinned, (k, v), strict=False):
            pinned[:, :, min(at, self.pin)] = x[:, :, 0]
        s.place_at(at, pos)

    def put(self, at: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """The tokens at pos (B,T) into the slots at (B,Hkv,T)."""
        self._write(at, k, v)
        self.slots.place(self.slots.flat(at), pos)

    def _encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (*self.codecs[0].encode(k), *self.codecs[1].encode(v))

    def _write(self, at: Tensor, k: Tensor, v: Tensor) -> None:
        row, codes_k, codes_v = self.slots.flat(at), self.codecs[0].encode(k), self.codecs[1].encode(v)
        for *planes, x, y in zip(*self.planes, codes_k, codes_v, strict=True):
            self.ctx.ops.append(x, y, row, *planes)
        if self.pinned:
            head = torch.arange(at.shape[:2].numel(), device=at.device).view(*at.shape[:2], 1) * (self.pin + 1)
            self.ctx.ops.append(k, v, (at.clamp(max=self.pin) + head).flatten(), *self.pinned)

    def take(self, k: Tensor, v: Tensor, pos: Tensor, real: Tensor) -> None:
        """Tokens (B,Hkv,T) that each head adds to what it holds, of which only the first `real` are there."""
        s = self.slots
        at = s.cursor[..., None] + torch.arange(pos.shape[2], device=pos.device)
        self._write(at, k, v)
        s.add(at, pos, real)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        step = self.slots.span  # in one piece no two tokens may want the same slot
        for a in range(0, k.shape[2], step):
            self.append(k[:, :, a : a + step], v[:, :, a : a + step], pos[:, a : a + step])

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        watches = self.policy.watches if q.shape[2] == 1 else None
        parts = self.parts(q, pos, near)
        if not self.pin and near is None:
            return parts[0]
        return join(parts, watches.group if watches else None, self.slots.cursor.shape[1])

    def parts(
        self, q: Tensor, pos: Tensor, near: Tensor | None = None, each: bool = False
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """`read`, apart: of the sinks where they are read with queries of their own, of the pinned tokens, of the others. More
        than one, or `each`: votes are of each query head (B,H,S).
        """
        n = self.slots.bound
        sinks = 0 if near is None else min(self.slots.protected, n)
        pinned = max(sinks, min(self.pin, n))
        spans = [(near, 0, sinks), (q, sinks, pinned), (q, pinned, n)]
        return [self._part(x, pos, a, b, each or self.pin > 0) for x, a, b in spans if a < b]

    def _part(self, q: Tensor, pos: Tensor, a: int, b: int, each: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The slots a … b−1, all pinned or none."""
        watches = self.policy.watches if q.shape[2] == 1 else None
        s, (codec_k, codec_v), dtype = self.slots, self.codecs, self.ctx.dtype
        length = None if s.even else (s.length - a).clamp(0, b - a)
        if b <= self.pin:
            k, v = (x[:, :, a:b] for x in self.pinned)
            turned = q
        else:
            k, v = (
                codec.decode([x[:, :, a:b] for x in planes], dtype)
                for codec, planes in zip(self.codecs, self.planes, strict=True)
            )
            turned = codec_k.turn(q)
        ask, window = (turned, k, v, length, s.pos[:, :, a:b], pos), s.sliding_window
        if watches is None:
            out, lse, votes = self.ctx.ops.decode(*ask, window)
        else:
            group = "each" if each else watches.group
            out, lse, votes = self.ctx.ops.decode(*ask, window, group, watches.noises(0))
        return (out if b <= self.pin else codec_v.back(out)), lse, votes

    def maintain(self, written: int) -> None:
        """Nothing to do: slots are written in place."""

    def freeze(self) -> None:
        self.slots.freeze()

    def unpack(self) -> list[Kept]:
        k, v = (
            codec.back(codec.decode(planes, self.ctx.dtype)).to(self.ctx.dtype)
            for codec, planes in zip(self.codecs, self.planes, strict=True)
        )
        if self.exact is None:
            return self.slots.unpack(k.view(-1, k.shape[-1]), v.view(-1, v.shape[-1]))
        if self.pinned:
            k, v = (
                torch.cat((x[:, :, : self.pin], y[:, :, self.pin :]), 2)
                for x, y in zip(self.pinned, (k, v), strict=True)
            )
        codes = {
            f"{name}{i}": plane.view(-1, plane.shape[3])
            for name, planes in zip("kv", self.planes, strict=True)
            for i, plane in enumerate(planes)
        }
        for name, codec in zip("kv", self.codecs, strict=True):
            if codec.scale is not None:
                codes[f"{name}s"] = codec.scale.expand(-1, -1, self.slots.capacity, 1).reshape(-1, 1)
        return self.slots.unpack(k.view(-1, k.shape[-1]), v.view(-1, v.shape[-1]), codes)

    def tensors(self) -> list[Tensor]:
        constants = [x for codec in self.codecs for x in codec.tensors()]
        return [*self.planes[0], *self.planes[1], *self.pinned, *self.slots.tensors(), *constants]

    def hosted(self) -> list[Tensor]:
        return []

    @property
    def length(self) -> Tensor:
        return self.slots.length

    def live(self) -> tuple[int, int, int]:
        held, s = int(self.slots.length.sum()), self.slots
        exact = int(self.slots.length.clamp(max=self.pin).sum()) * self.ctx.config.head_dim * self.ctx.dtype.itemsize
        k, v = (int(held * codec.width) + exact for codec in self.codecs)
        per_slot = 4 if s.flat_votes is None else 8
        return k, v, sum(t.nbytes for t in s.tensors()) - (s.total - held) * per_slot


def join(
    parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], group: str | None, heads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a query heard in disjoint sets of slots → as if in one. group: how the votes (B,H,S) that each query head gave, a softmax
    of its own per part, become those of KV heads (B,Hkv,S); None where nobody asks.
    """
    out, lse = merge([p[:2] for p in parts])
    if group is None:
        return out, lse, None
    votes = torch.cat([votes * (mine - lse).exp() for _, mine, votes in parts if votes is not None], 2)
    votes = votes.unflatten(1, (heads, -1))
    return out, lse, votes.mean(2) if group == "mean" else votes.amax(2)
