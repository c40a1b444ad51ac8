"""K and V as they are, or as codes of a format that rounds, in a fixed number of slots (B,Hkv,S,·). Each token is written
independently of the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, StoreState
from nanokv.cache.protocol import StoreSpec
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy
from nanokv.stores.quant.codec import Codec, CodeState

SLOT_COUNTERS = 4 * 4 + 8  # bytes per row and head: cursor, limit, asked_limit, sink (int32) and first_index (int64)


@dataclass(frozen=True, kw_only=True)
class Dense(StoreSpec):
    """Stores K and V as they are (no paper)."""

    reads_by_chunk = True

    def behind_prefix(self, n: int) -> StoreSpec | None:
        return self

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        per_head = 2 * config.head_dim * dtype.itemsize + 4  # K, V and an int32 position
        return config.num_key_value_heads * per_head, config.num_key_value_heads * SLOT_COUNTERS

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> SlotStore:
        return SlotStore(rows, policy, room, ctx, plain_codecs(ctx))


@dataclass(frozen=True, kw_only=True)
class PerToken(StoreSpec):
    """A store that rounds each token alone, when it comes, and never again.

    pin  first tokens that stay exact, because attention sinks suffer most from rounding (IntactKV, arXiv:2403.01241).
         In a head that overwrites tokens, this has no effect. Sinks that a policy never evicts are exact in any case.
    """

    pin: int = 0
    state_type = CodeState

    def __post_init__(self):
        if self.pin < 0:
            raise ValueError(f"pin={self.pin}; give how many of the first tokens stay exact, or 0")

    @abstractmethod
    def codecs(self, rows: Sequence[Kept], ctx: Context) -> tuple[Codec, Codec]:
        """The codecs of K and of V for one layer that starts with these tokens."""

    @abstractmethod
    def widths(self, dim: int) -> tuple[float, float]:
        """Bytes per token and KV head for K and for V."""

    def incompatible_policy(self, policy: Policy) -> str:
        if self.pin and policy.eviction == "score":
            return "may evict the first tokens while decoding, so none stay exact: use pin=0"
        return super().incompatible_policy(policy)

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        pin = max(self.pin, sink)
        pinned = 2 * (pin + 1) * config.head_dim * dtype.itemsize + 4 if pin else 0
        heads = config.num_key_value_heads
        return heads * (sum(self.widths(config.head_dim)) + 4), heads * (SLOT_COUNTERS + pinned)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> SlotStore:
        return SlotStore(rows, policy, room, ctx, self.codecs(rows, ctx), self.pin)


def plain_codecs(ctx: Context) -> tuple[Codec, Codec]:
    """Of K and V that stay as they are."""
    codec = Codec(ctx.config.head_dim, ctx.dtype)
    return codec, codec


class SlotStore:
    """Tensors of K and V in slots.

    `pinned` holds copies of the first `n_pinned` slots, and reads take these instead of the codes. In a head with fewer
    exact tokens, the copies of the others are rounded. The last slot of `pinned` takes the writes for all other slots, so
    that every write has a target.
    """

    needs_host_sync = refill_ends_capture = False
    until_maintenance = None

    def __init__(
        self,
        rows: list[Kept],
        policy: Policy,
        room: int,
        ctx: Context,
        codecs: tuple[Codec, Codec],
        pin: int = 0,
    ):
        self.slots, self.policy, self.ctx = Slots(rows, room, ctx.sliding_window), policy, ctx
        self.codecs, self.rounds = codecs, codecs[0].rounds
        s = self.slots
        # how many first slots are exact: eviction by score may reuse any slot, and a ring reuses all behind its sinks
        sinks = torch.zeros_like(s.sink) if policy.eviction == "score" else s.sink
        exact = torch.where(s.overwrites, sinks, sinks.clamp(min=pin))
        self.n_pinned = min(int(exact.max()), s.capacity) if self.rounds else 0
        differs = self.n_pinned > 0 and bool((exact != exact[0, 0]).any())
        self.exact_per_head = exact if differs else None  # (B,Hkv) int32; None: `n_pinned` in all heads
        self.lossless_prefix = self.n_pinned if self.rounds else None
        n, heads, dim = len(rows), ctx.config.num_key_value_heads, ctx.config.head_dim
        self.planes = [
            [
                self._allocate(name, n, heads, self.slots.capacity, width, dtype=dtype)
                for width, dtype in codec.plane_types
            ]
            for name, codec in zip("kv", codecs, strict=True)
        ]
        self.pinned = [ctx.empty(n, heads, self.n_pinned + 1, dim) for _ in range(2 if self.n_pinned else 0)]
        self._fill(rows)

    def _allocate(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """One plane of K or V (`name`): a store that keeps some on the host overrides this."""
        return self.ctx.empty(*shape, dtype=dtype)

    def _fill(self, rows: list[Kept]) -> None:
        for plane in (*self.planes[0], *self.planes[1], *self.pinned):
            plane.zero_()  # a masked slot must still hold a number: 0 · NaN is NaN
        for b, r in enumerate(rows):
            n = r.k.shape[2]
            m = min(n, self.n_pinned)
            for i, (x, planes, codec) in enumerate(zip((r.k, r.v), self.planes, self.codecs, strict=True)):
                codec = codec.of_row(b)
                codes = codec.encode(x, r.pos) if r.state is None else r.state.codes[i]
                for plane, code in zip(planes, codes, strict=True):
                    if r.state is not None and (code.shape[3], code.dtype) != (plane.shape[3], plane.dtype):
                        raise ValueError("the codes are of another store")
                    plane[b, :, :n] = code[0]
                if m:
                    slot = torch.arange(m, device=x.device).expand(1, x.shape[1], m)
                    first = [code[:, :, :m] for code in codes]
                    self.pinned[i][b, :, :m] = self._copies(x[:, :, :m], first, r.pos[:, :, :m], codec, slot, b)[0]

    def reserve(self, room: int) -> bool:
        return False

    def refill(self, rows: list[Kept], room: int) -> bool:
        if not self.slots.refill(rows, room):
            return False
        self._fill(rows)
        return True

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        s = self.slots
        if not s.uniform or self.exact_per_head is not None or self.policy.eviction == "score" or k.shape[2] > 1:
            self.append_by_index(k, v, pos)
            return
        slot = s.next_slot_on_host()  # the host knows the slot: plain copies, no index arithmetic
        for plane, code in zip((*self.planes[0], *self.planes[1]), self._encode(k, v, pos[:, None]), strict=True):
            plane[:, :, slot : slot + 1] = code
        for pinned, x in zip(self.pinned, (k, v), strict=False):
            pinned[:, :, min(slot, self.n_pinned)] = x[:, :, 0]
        s.record_at(slot, pos)

    def append_by_index(self, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        """`append` where the device computes the slots → their flat indices (B·Hkv·T,)."""
        s = self.slots
        if self.policy.eviction == "score":
            index, _ = s.take_lowest(self.policy.slot_scores(s, pos), pos, self.ctx.ops.take_lowest)
        elif k.shape[2] > 1 or self.pinned:
            slot = s.next_slots(k.shape[2])
            self._write(slot, k, v, pos[:, None])
            index = s.flat_index(slot)
            s.record(index, pos)
            return index
        else:
            index = s.take(pos, self.ctx.ops.take_slots)
        self.write_at(index, k, v, pos[:, None])
        return index

    def _encode(self, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        return (*self.codecs[0].encode(k, pos), *self.codecs[1].encode(v, pos))

    def write_at(self, index: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Write tokens (B,Hkv,T,D) at pos (B,·,T) into the slots of these flat indices (B·Hkv·T,) → their codes."""
        codes_k, codes_v = self.codecs[0].encode(k, pos), self.codecs[1].encode(v, pos)
        for *planes, x, y in zip(*self.planes, codes_k, codes_v, strict=True):
            self.ctx.ops.append(x, y, index, *planes)
        return codes_k, codes_v

    def _write(self, slot: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
        codes_k, codes_v = self.write_at(self.slots.flat_index(slot), k, v, pos)
        if self.pinned:
            first = torch.arange(slot.shape[:2].numel(), device=slot.device).view(*slot.shape[:2], 1)
            index = slot.clamp(max=self.n_pinned) + first * (self.n_pinned + 1)
            codes = zip((k, v), (codes_k, codes_v), self.codecs, strict=True)
            copies = (self._copies(x, of_x, pos, codec, slot) for x, of_x, codec in codes)
            self.ctx.ops.append(*copies, index.flatten(), *self.pinned)

    def _copies(
        self, x: Tensor, codes: Sequence[Tensor], pos: Tensor, codec: Codec, slot: Tensor, b: int | None = None
    ) -> Tensor:
        """What `pinned` holds of x (B,Hkv,T,D), whose tokens have these codes, positions (B,·,T) and slots (B,Hkv,T).
        b: x is of this row.
        """
        if self.exact_per_head is None:
            return x
        exact_per_head = self.exact_per_head if b is None else self.exact_per_head[b : b + 1]
        rounded = codec.restore(codec.decode(codes, pos, x.dtype)).to(x.dtype)
        return torch.where((slot < exact_per_head[..., None])[..., None], x, rounded)

    def append_masked(self, k: Tensor, v: Tensor, pos: Tensor, valid: Tensor) -> None:
        """Store tokens (B,Hkv,T) behind what each head holds. valid (B,Hkv,T): which of them count; these come first."""
        s = self.slots
        slot = s.cursor[..., None] + torch.arange(pos.shape[2], device=pos.device)
        self._write(slot, k, v, pos)
        s.record_masked(slot, pos, valid)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        step = self.slots.distinct_writes  # within one piece no two tokens may take the same slot
        for a in range(0, k.shape[2], step):
            self.append(k[:, :, a : a + step], v[:, :, a : a + step], pos[:, a : a + step])

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        wanted = self.policy.step_request(q.shape[2])
        parts = self.read_parts(q, pos, q_sink)
        if len(parts) == 1 and not self.n_pinned:
            return parts[0]
        return join(parts, wanted.over_group if wanted else None, self.slots.cursor.shape[1])

    def read_parts(
        self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None, each_head: bool = False
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """`read`, in parts: the sinks where `q_sink` is given, the pinned tokens, the others in blocks of the backend's
        `unpack_block`.

        If there are several parts, if tokens are pinned, or with `each_head`, the scores are those of each query head:
        (B,H,S).
        """
        n = self.slots.max_used
        sinks = 0 if q_sink is None else min(self.slots.n_sink, n)
        pinned = max(sinks, min(self.n_pinned, n))
        block = self.ctx.ops.unpack_block if self.codecs[0].makes_tensors else None
        others = [(q, pinned, n)]
        if block:  # only then: a compiled step would hold a loop to this length
            others = [(q, a, min(a + block, n)) for a in range(pinned, n, block)]
        spans = [(x, a, b) for x, a, b in [(q_sink, 0, sinks), (q, sinks, pinned), *others] if a < b]
        planes, each_head = self._planes_to_read(q), each_head or len(spans) > 1 or self.n_pinned > 0
        return [self._read_span(planes, x, pos, a, b, each_head) for x, a, b in spans]

    def read_by_chunk(self, rotated: Callable[[int], Tensor], size: int, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Attention where the slots a … a+size−1 are read by the queries rotated(a) (B,H,T,D), for a = 0, size, 2·size …
        → out, lse.
        """
        n, planes = self.slots.max_used, self.planes
        spans = [(a, min(a + size, n)) for a in range(0, n, size)]
        return merge([self._read_span(planes, rotated(a), pos, a, b, False)[:2] for a, b in spans])

    def _planes_to_read(self, q: Tensor) -> list[list[Tensor]]:
        """The planes of K and of V on the device: a store that keeps some on the host overrides this."""
        return self.planes

    def _read_span(
        self, planes: list[list[Tensor]], q: Tensor, pos: Tensor, a: int, b: int, each_head: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend to the slots a … b−1; either all of them are pinned or none is."""
        wanted = self.policy.step_request(q.shape[2])
        s, (codec_k, codec_v) = self.slots, self.codecs
        key_pos = s.pos[:, :, a:b]
        length = None if s.uniform else s.length
        if length is not None and (a, b) != (0, s.max_used):
            length = (length - a).clamp(0, b - a)
        is_pinned = b <= self.n_pinned
        if is_pinned:
            k, v = (x[:, :, a:b] for x in self.pinned)
        else:
            k, v = (
                codec.decode([x[:, :, a:b] for x in half], key_pos, self.ctx.dtype)
                for codec, half in zip(self.codecs, planes, strict=True)
            )
            q = codec_k.query_for_codes(q)
        given = q, k, v, length, key_pos, pos, s.sliding_window
        if wanted is None:
            out, lse, scores = self.ctx.ops.decode(*given)
        else:
            over_group = "each" if each_head else wanted.over_group
            out, lse, scores = self.ctx.ops.decode(*given, over_group, wanted.noise(0))
        return (out if is_pinned else codec_v.restore(out)), lse, scores

    def maintain(self, written: int) -> None:
        """Nothing to do: slots are written in place."""

    def freeze(self) -> None:
        self.slots.freeze()

    def unpack(self) -> list[Kept]:
        k, v = (
            codec.restore(codec.decode(planes, self.slots.pos, self.ctx.dtype)).to(self.ctx.dtype)
            for codec, planes in zip(self.codecs, self.planes, strict=True)
        )
        if self.pinned:
            n = self.n_pinned
            k, v = (torch.cat((x[:, :, :n], y[:, :, n:]), 2) for x, y in zip(self.pinned, (k, v), strict=True))
        found, sources = self.slots.unpack(k.view(-1, k.shape[-1]), v.view(-1, v.shape[-1]))
        if not self.rounds:
            return found
        return [r.with_state(self._state(index, b)) for b, (r, index) in enumerate(zip(found, sources, strict=True))]

    def _state(self, index: Tensor, b: int) -> StoreState:
        """The codes of the tokens in these slots (flat indices (Hkv,N)) of row b."""
        codes = tuple(tuple(plane.view(-1, plane.shape[3])[index][None] for plane in planes) for planes in self.planes)
        scales = tuple(
            None
            if codec.scale is None
            else codec.scale.expand(-1, -1, self.slots.capacity, 1).reshape(-1, 1)[index][None]
            for codec in self.codecs
        )
        return CodeState(codes, scales, tuple(codec.table_of(b) for codec in self.codecs))

    def tensors(self) -> list[Tensor]:
        constants = [x for codec in self.codecs for x in codec.tensors()]
        numbers = self.slots.tensors() if self.exact_per_head is None else [*self.slots.tensors(), self.exact_per_head]
        return [*self.planes[0], *self.planes[1], *self.pinned, *numbers, *constants]

    def host_tensors(self) -> list[Tensor]:
        return []

    @property
    def length(self) -> Tensor:
        return self.slots.length

    def used_bytes(self) -> tuple[int, int, int]:
        s = self.slots
        held, pinned = int(s.length.sum()), int(s.length.clamp(max=self.n_pinned).sum())
        exact = pinned * self.ctx.config.head_dim * self.ctx.dtype.itemsize
        tables = [0 if codec.table is None else codec.table.nbytes for codec in self.codecs]
        k, v = (int(held * codec.token_bytes) + exact + n for codec, n in zip(self.codecs, tables, strict=True))
        per_slot = 4 if s.flat_scores is None else 8
        return k, v, sum(t.nbytes for t in s.tensors()) - (s.total - held) * per_slot


def join(
    parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], over_group: str | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, scores) over disjoint sets of slots → the same as if they were one set.

    Scores come as each query head's own softmax within its part, (B,H,S); they become those of the KV heads,
    (B,Hkv,S), reduced by `over_group`. None: nobody wants scores.
    """
    out, lse = merge([p[:2] for p in parts])
    if over_group is None:
        return out, lse, None
    scores = torch.cat([s * (part_lse - lse).exp() for _, part_lse, s in parts if s is not None], 2)
    scores = scores.unflatten(1, (kv_heads, -1))
    return out, lse, scores.mean(2) if over_group == "mean" else scores.amax(2)
