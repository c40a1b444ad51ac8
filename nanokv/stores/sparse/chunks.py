"""Chunks of tokens of which a step reads only the few that its query needs: what stores that drop nothing and read little share.

The tokens of a text lie in one of three places: chunks, held as a method likes and wherever it likes; single exact tokens on the
device (those a method picks, the end of the prompt, all that comes later); and, as copies, a buffer of the chunks read last.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context, StoreSpec
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy
from nanokv.stores.dense import BOOKKEEPING, SlotStore
from nanokv.stores.quant.codec import Codec

LEAST = 256  # tokens: no percent reads less
PIECE = 512  # chunks that a turn of several tokens reads at once


@dataclass(frozen=True, kw_only=True)
class Chunked(StoreSpec):
    """chunk: tokens that are read together. budget: tokens per KV head that a step reads beside the exact ones, or percent of the prompt,
    256 at least. local: chunks at the prompt's end that stay exact. reuse: whether what a step has read stays for the next one. grow:
    whenever so many more tokens have come, they become chunks as well; 0: they stay exact.
    """

    chunk: int = 8
    budget: int | str = "1.5625%"
    local: int = 4
    reuse: bool = True
    grow: int = 0

    def __post_init__(self):
        given = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(Chunked))
        if self.chunk < 1 or self.local < 0 or self.grow < 0 or 0 < self.grow < self.chunk:
            raise ValueError(f"{given}; chunk is at least 1 token, local at least 0 chunks, grow 0 or at least a chunk")
        text = self.budget
        percent = isinstance(text, str) and re.fullmatch(r"[0-9]*\.?[0-9]+%", text) is not None
        if not (0 < float(text[:-1]) <= 100 if percent else isinstance(text, int) and text >= 1):
            raise ValueError(f"{given}; budget is a number of tokens such as 256, or percent of the prompt such as 2%")

    def refuses(self, keep: Policy) -> str:
        if keep.demotes:
            return super().refuses(keep)
        return "" if keep.whole else "drops tokens of the prompt, and what is left makes no chunks to choose from"

    @property
    def most(self) -> int:
        return self.grow

    def misfit(self, config: Any) -> str:
        if self.grow and config.sliding_window:
            return "under a model's own sliding window what is generated leaves in time, so none of it becomes chunks: leave grow out"
        return ""

    def note(self, n: int) -> str:
        return "" if any(self.shape(n)) else f"{n} tokens are too few for chunks to choose from, so all lie exact"

    def room(self, ahead: int) -> int:
        """Slots for exact tokens to come."""
        return min(ahead, self.grow + self.chunk) if self.grow else ahead

    def spared(self, n_chunks: int) -> int:
        """How many chunks of each head stay exact besides."""
        return 0

    def shape(self, n: int) -> tuple[int, int, int]:
        """Of a prompt of n tokens: chunks; how many each head may choose from; how many it reads. 0 where these are not there."""
        chunks = max(0, n // self.chunk - self.local)
        free = chunks - self.spared(chunks)
        budget = self.budget
        if isinstance(budget, str):
            budget = max(LEAST, int(n * float(budget[:-1]) / 100))
        k = -(-budget // self.chunk)
        return (chunks, free, k) if 0 < k <= free else (0, 0, 0)

    def host_bytes(self, config: Any, dtype: torch.dtype, kept: int, ahead: int) -> int:
        chunks = self.shape(kept)[0]
        late = ahead // self.chunk if self.grow and chunks else 0
        width = config.num_key_value_heads * config.head_dim * dtype.itemsize * len(self.on_host)
        return (chunks + late) * self.chunk * width

    @property
    def on_host(self) -> tuple[str, ...]:
        """Names of what chunks leave behind that lies in the host's memory, each a row per token of a head's width."""
        return ()

    along: ClassVar[dict[str, int]]  # name → which dim of what `build` makes counts chunks

    @abstractmethod
    def exact(self, kept: Kept, chunks: int) -> Tensor:
        """Of a whole prompt: (Hkv,m) chunks that stay exact, ascending."""

    @abstractmethod
    def build(
        self, kept: Kept, chunks: int, free: Tensor, body: dict[str, Tensor] | None, ctx: Context
    ) -> dict[str, Tensor]:
        """What the first chunks of these tokens leave behind, of one row; free (Hkv,L): those that a step may choose; body: what those of
        the prompt left, if they come later.
        """

    def split(self, r: Kept, ctx: Context) -> tuple[Kept, dict[str, Tensor]]:
        """One row → its exact tokens, and what its chunks become; nothing where there are none."""
        if r.codes is not None:
            near = Kept(*(r.codes[f"near_{f}"] for f in NEAR), score=r.score)
            return near, {n: x[0] for n, x in r.codes.items() if not n.startswith("near_")}
        r = replace(r, k=r.k.to(ctx.dtype), v=r.v.to(ctx.dtype))
        (heads, n), window = r.pos.shape[1:], ctx.config.sliding_window
        grows = bool((r.limit < 0).all()) and bool((r.length == n).all())
        whole = n > 0 and grows and bool((r.pos[..., -1] - r.pos[..., 0] == n - 1).all())
        whole = whole and (int(r.pos[0, 0, 0]) == 0 or (window is not None and n >= window - 1))  # … and no mere edge
        chunks, free, k = self.shape(n) if whole else (0, 0, 0)
        if not chunks:
            return r, {}
        exact = self.exact(r, chunks)
        mine = torch.zeros(heads, chunks, dtype=torch.bool, device=r.pos.device).scatter(1, exact, True)
        left, number = (~mine).nonzero()[:, 1].view(heads, free), r.pos.new_tensor
        numbers = {"first": r.pos[0, 0, 0], "free": number(free), "take": number(k), "chunks": number(chunks)}
        body = self.build(r, chunks, left, None, ctx) | {"land": left.to(torch.int32)} | numbers
        inside = exact[..., None] * self.chunk + torch.arange(self.chunk, device=exact.device)
        tail = torch.arange(chunks * self.chunk, n, device=exact.device).expand(heads, -1)
        at = torch.cat((inside.flatten(1), tail), 1)[None]
        k_near, v_near, pos = ctx.ops.compact(r.k, r.v, r.pos, at)
        near = Kept(k_near, v_near, pos, torch.full_like(r.length, at.shape[2]), r.limit, r.sink, score=r.score)
        return near, body

    def early(self, kept: Kept, ctx: Context) -> Kept:
        near, body = self.split(kept, ctx)
        if not body:
            return kept
        body = {name: x.cpu() if name in self.on_host else x for name, x in body.items()}
        return replace(near, codes=_near(near) | {name: x[None] for name, x in body.items()})

    @abstractmethod
    def body_bytes(self, config: Any, itemsize: int, chunks: int, free: int, n: int) -> int:
        """Of one row in one layer, on the device: what the chunks themselves take."""

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        """Of a token that comes later; those of the prompt: `held`."""
        per_head = 2 * config.head_dim * dtype.itemsize + 4
        return config.num_key_value_heads * per_head, config.num_key_value_heads * BOOKKEEPING

    def held(self, config: Any, dtype: torch.dtype, cost: tuple[float, int], kept: int, ahead: int) -> float:
        (token, fixed), (chunks, free, k) = cost, self.shape(kept)
        near, heads = kept - free * self.chunk, config.num_key_value_heads
        if not chunks:
            return (near + ahead) * token + fixed
        buffer = k * heads * (2 * self.chunk * config.head_dim * dtype.itemsize + 4)
        late = ahead // self.chunk if self.grow else 0  # chunks of what is generated
        body = (
            self.body_bytes(config, dtype.itemsize, chunks + late, free + late, kept)
            + heads * (free + late) * 4
            + 4 * 4
        )
        return (near + self.room(ahead)) * token + fixed + body + buffer


class ChunkStore(ABC):
    """Rows may differ in all their numbers: what is shorter is padded, and the padding never chosen.

    A single token reads the best chunks, a turn of several reads all. A row that keeps only its text's edges, or has fewer chunks than a
    token reads, lies in the exact part alone. Readers of one store share its buffer.
    """

    exact: int | None = 0
    of_k: tuple[str, ...] = ()  # what `build` makes of keys …
    of_v: tuple[str, ...] = ()  # … and of values

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec: Chunked):
        self.policy, self.ctx, self.spec = policy, ctx, spec
        self.since = 0  # tokens that came after the last chunk was made
        self._lay([spec.split(r, ctx) for r in rows], room)

    def _lay(self, parts: list[tuple[Kept, dict[str, Tensor]]], room: int) -> None:
        """Exact tokens and chunks of every row, in memory of their own."""
        ctx, bodies, rows = self.ctx, [body for _, body in parts], len(parts)
        self.take, self.free = ([int(b[f]) if b else 0 for b in bodies] for f in ("take", "free"))
        self.near, self.chunks, self.k = self._exact([kept for kept, _ in parts], room), 0, 0
        if not any(bodies):
            return
        self.k, self.chunks = max(self.take), max(self.free)
        self.even = min(self.take) == self.k and min(self.free) == self.chunks
        self.sizes = [{name: x.shape for name, x in b.items()} for b in bodies]
        names = next(b for b in bodies if b)
        self.body = {name: self._stack(name, [b.get(name) for b in bodies]) for name in names}
        heads, width = ctx.config.num_key_value_heads, self.spec.chunk * ctx.config.head_dim
        nothing = -1 - torch.arange(self.k, dtype=torch.int32, device=ctx.device)
        self.held = nothing.expand(rows, heads, -1).clone()  # chunks in the buffer
        self.keys, self.values = (ctx.empty(rows, heads, self.k, width).zero_() for _ in range(2))

    def _exact(self, rows: list[Kept], room: int) -> SlotStore:
        """… of them the exact tokens."""
        self.ahead, plain = room, Codec(self.ctx.config.head_dim, self.ctx.dtype)
        room = self.spec.room(room) if all(self.free) else room
        return SlotStore(rows, self.policy, room, self.ctx, (plain, plain))

    @property
    def waits(self) -> bool:
        """Whether the host looks up what a step fetches, or how much of it is new: as long as no kernel does."""
        looks = bool(self.hosted()) or self.spec.reuse
        return bool(self.chunks) and looks and self.ctx.device.type != "cpu" and self.ctx.ops.name != "triton"

    # ---- what a method says of a step ------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, q: Tensor, seen: Tensor | None) -> Tensor:
        """How much a query (B,H,1,D) wants each free chunk, (B,Hkv,L); seen: which of them there are."""

    @abstractmethod
    def fill(self, ids: Tensor, fresh: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Keys and values of chunks ids (B,Hkv,k) into (B,Hkv,k,chunk·D), only where `fresh`. Negative ids: anything."""

    # ---- rows in, rows out --------------------------------------------------------------------------------------------

    def _stack(self, name: str, rows: Sequence[Tensor | None]) -> Tensor:
        """Of every row, padded with zeros to the largest."""
        there = [x for x in rows if x is not None]
        size = [len(rows), *(max(n) for n in zip(*(x.shape for x in there), strict=True))]
        if name in self.spec.on_host:
            out = self.ctx.host(*size, dtype=there[0].dtype)
        else:
            out = self.ctx.empty(*size, dtype=there[0].dtype)
        out.zero_()
        for b, x in enumerate(rows):
            if x is not None:
                out[b][tuple(map(slice, x.shape))] = x
        return out

    def unpack(self) -> list[Kept]:
        near = self.near.unpack()
        if not self.chunks:
            return [replace(r, codes=_near(r)) for r in near]
        ids, c = self.body["land"], self.spec.chunk
        pos = self._pos(ids)
        keys, values = self._whole(ids)
        rows = []
        for b, r in enumerate(near):
            codes = _near(r)
            if not self.free[b]:
                rows.append(replace(r, codes=codes))
                continue
            n = self.free[b] * c
            k, v, when = (
                torch.cat((x, y[b : b + 1, :, :n]), 2)
                for x, y in ((r.k, keys), (r.v, values), (r.pos, pos.to(r.pos.dtype)))
            )
            at = when.masked_fill(when < 0, torch.iinfo(torch.int32).max).argsort(-1)
            k, v, when = self.ctx.ops.compact(k, v, when, at)
            codes |= {name: x[None].clone() for name, x in self._of_row(b).items()}
            rows.append(replace(r, k=k, v=v, pos=when, length=r.length + n, codes=codes))
        return rows

    def _of_row(self, b: int) -> dict[str, Tensor]:
        """Row b's chunks, without what only pads them."""
        return {name: self.body[name][b][tuple(map(slice, size))] for name, size in self.sizes[b].items()}

    def maintain(self, written: int) -> bool:
        self.since, self.ahead = self.since + written, self.ahead - written
        if not self.spec.grow or self.since < self.spec.grow or not self.chunks:
            return False
        self.since = 0
        frozen, near = self.slots.frozen, self.near.unpack()
        self._lay([self._grown(r, self._of_row(b)) for b, r in enumerate(near)], self.ahead)
        if frozen:
            self.freeze()
        return True

    def _grown(self, r: Kept, body: dict[str, Tensor]) -> tuple[Kept, dict[str, Tensor]]:
        """Exact tokens of one row that now are chunks' go from the one to the others."""
        if not body:
            return r, body
        c, old, (heads, n) = self.spec.chunk, int(body["chunks"]), r.pos.shape[1:]
        start = int((r.pos[0, 0] < body["first"] + old * c).sum())  # behind what stays exact from the start
        new = max(0, (n - start) // c - self.spec.local)
        late = replace(r, k=r.k[:, :, start:], v=r.v[:, :, start:], pos=r.pos[:, :, start:])
        ids = torch.arange(new, device=r.pos.device).expand(heads, -1)
        made = self.spec.build(late, new, ids, body, self.ctx) | {"land": (old + ids).to(torch.int32)}
        body |= {
            name: torch.cat((body[name], x.to(body[name].device)), self.spec.along[name]) for name, x in made.items()
        }
        body |= {name: body[name] + new for name in ("free", "chunks")}
        k, v, pos = (torch.cat((x[:, :, :start], x[:, :, start + new * c :]), 2) for x in (r.k, r.v, r.pos))
        return replace(r, k=k, v=v, pos=pos, length=r.length - new * c), body

    def reserve(self, room: int) -> bool:
        frozen, self.since = self.slots.frozen, 0
        self.near = self._exact(self.near.unpack(), room)
        if frozen:
            self.freeze()
        return True

    def refill(self, rows: list[Kept], room: int) -> bool:
        return False

    # ---- a step -------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> Slots:
        return self.near.slots

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.near.append(k, v, pos)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.near.extend(k, v, pos)

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = [self.near.read(q, pos)[:2]]
        if self.chunks:
            parts += [self._best(q, pos)] if q.shape[2] == 1 else self._all(q, pos)
        return *(merge(parts) if len(parts) > 1 else parts[0]), None

    def _best(self, q: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        held, fresh = self.place(self.choose(q, pos))
        self.fill(held, fresh if self.spec.reuse else None, self.keys, self.values)
        self.held.copy_(held)
        return self._attend(q, pos, held, self.keys, self.values)

    def choose(self, q: Tensor, pos: Tensor) -> Tensor:
        """(B,Hkv,k): the chunks that this step reads; negative and unlike each other where a row reads fewer."""
        seen = self._there(pos)
        score = self.score(q, seen)
        score = score if seen is None else score.masked_fill(~seen, -torch.inf)
        best = score.topk(self.k, -1).indices
        rank = torch.arange(self.k, dtype=torch.int32, device=q.device)
        ids = self.body["land"].gather(2, best)
        if seen is None:
            return ids
        return torch.where(seen.gather(2, best) & (rank < self.body["take"][:, None, None]), ids, -1 - rank)

    def _there(self, pos: Tensor) -> Tensor | None:
        """bool (B,Hkv,L): which free chunks a row has, and its model's own window still shows; None: all."""
        window, land = self.slots.sliding_window, self.body["land"]
        if self.even and window is None:
            return None
        seen = torch.arange(land.shape[2], device=land.device) < self.body["free"][:, None, None]
        if window is None:
            return seen.expand_as(land)
        last = self.body["first"][:, None, None] + (land + 1) * self.spec.chunk - 1
        return seen & (last > pos[:, :, None] - window)  # of one token

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks that are wanted (B,Hkv,k) → which one each slot of the buffer holds from now on, and where that is new.

        What is there already stays where it is; each of the others takes a slot that nobody wants any more.
        """
        same = self.held[..., :, None] == ids[..., None, :]  # (B,Hkv,slot,wanted)
        fresh, missing = ~same.any(3), ~same.any(2)
        into, which = (torch.argsort(x.to(torch.int8), stable=True, dim=-1, descending=True) for x in (fresh, missing))
        new = torch.where(missing.gather(2, which), ids.gather(2, which), self.held.gather(2, into))
        return self.held.scatter(2, into, new), fresh

    def _all(self, q: Tensor, pos: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A turn passes over everything once, piece by piece: for many tokens that costs less than a choice for each."""
        land, parts = self.body["land"], []
        for a in range(0, self.chunks, PIECE):
            ids = land[:, :, a : a + PIECE]
            there = a + torch.arange(ids.shape[2], device=ids.device) < self.body["free"][:, None, None]
            ids = ids if self.even else torch.where(there, ids, -1)
            keys, values = (self.ctx.empty(*ids.shape, self.keys.shape[3]) for _ in range(2))
            self.fill(ids, None, keys, values)
            parts.append(self._attend(q, pos, ids, keys, values))
        return parts

    def _whole(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of chunks ids, (B,Hkv,k·chunk,D)."""
        keys, values = (self.ctx.empty(*ids.shape, self.keys.shape[3]) for _ in range(2))
        self.fill(ids, None, keys, values)
        return self._tokens(keys), self._tokens(values)

    def _tokens(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (self.spec.chunk, -1)).flatten(2, 3)

    def _pos(self, ids: Tensor) -> Tensor:
        """(B,Hkv,k) → (B,Hkv,k·chunk): where their tokens stand in the text."""
        c = self.spec.chunk
        at = ids[..., None] * c + torch.arange(c, device=ids.device)
        return self.body["first"][:, None, None] + at.flatten(2)

    def _attend(self, q: Tensor, pos: Tensor, ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The chunks ids, of which negative ones are not there."""
        window = self.slots.sliding_window
        seen = None if self.even and window is None else (ids >= 0).repeat_interleave(self.spec.chunk, 2)
        k, v, kpos = self._tokens(keys), self._tokens(values), self._pos(ids).to(torch.int32)
        return self.ctx.ops.decode(q, k, v, seen, kpos, pos, window)[:2]

    def freeze(self) -> None:
        self.near.freeze()

    # ---- the receipt --------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        mine = [self.held, self.keys, self.values] if self.chunks else []
        return [*self.near.tensors(), *mine, *(x for name, x in self._body() if name not in self.spec.on_host)]

    def hosted(self) -> list[Tensor]:
        return [x for name, x in self._body() if name in self.spec.on_host]

    def _body(self) -> list[tuple[str, Tensor]]:
        return list(self.body.items()) if self.chunks else []

    @property
    def length(self) -> Tensor:
        return self.near.length + self.body["free"][:, None] * self.spec.chunk if self.chunks else self.near.length

    def live(self) -> tuple[int, int, int]:
        (k, v, rest), near = self.near.live(), sum(x.nbytes for x in self.near.tensors())
        for name, x in self._body():
            k += x.nbytes if name in self.of_k else 0
            v += x.nbytes if name in self.of_v and name not in self.spec.on_host else 0
        ours = sum(
            x.nbytes for name, x in self._body() if name in (*self.of_k, *self.of_v) and name not in self.spec.on_host
        )
        return k, v, rest + sum(x.nbytes for x in self.tensors()) - near - ours


NEAR = ("k", "v", "pos", "length", "limit", "sink")


def _near(r: Kept) -> dict[str, Tensor]:
    """A row's exact tokens as codes, so that none of them becomes a chunk where they are packed anew."""
    return {f"near_{f}": getattr(r, f).clone() for f in NEAR}
