"""What the sparse stores share: they evict nothing, hold tokens in chunks, and a step reads only the few chunks that
its query needs.

A token lies in one of two places: in a chunk, held as the method likes and wherever it likes, or as a single exact
token on the device (outlier chunks, the end of the prompt, and later tokens until `grow` makes chunks of them). A
buffer holds copies of the chunks that were read last.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, StoreState
from nanokv.cache.protocol import StoreSpec
from nanokv.cache.slots import Slots
from nanokv.cache.validate import check_row
from nanokv.policies.base import Policy
from nanokv.stores.dense import SLOT_COUNTERS, SlotStore, plain_codecs

MIN_BUDGET = 256  # tokens: a percentage never reads fewer
GATHER_BLOCK = 512  # chunks that a turn of several tokens gathers at once
OLD_TENSOR_NAMES = {  # of chunk data, in files of nanokv 0.1
    "land": "chunk_ids",
    "take": "top_k",
    "free": "n_candidates",
    "first": "first_pos",
    "chunks": "n_chunks",
    "marks": "landmarks",
}
NUMBERS = ("n_chunks", "n_candidates", "top_k", "first_pos")  # chunk data that is one number per row
GROWN = "since_grown"  # its name in a file
EXACT_FIELDS = ("k", "v", "pos", "length", "limit", "sink")


@dataclass(frozen=True)
class ChunkState(StoreState):
    """One row of a ChunkStore: its exact tokens, its chunk data (empty if it has no chunks), and how many tokens came
    since chunks were last made.
    """

    exact: Kept
    chunk_data: Mapping[str, Tensor]
    since_grown: int = 0

    def check(self, row: Kept, spec: Any, ctx: Context) -> None:
        data, heads, c = self.chunk_data, ctx.config.num_key_value_heads, spec.chunk
        check_row(self.exact, ctx.config, int(row.pos.max()) + 1, int(row.sink.max()))
        if not 0 <= self.since_grown <= max(0, spec.grow - 1):
            raise ValueError(f"{GROWN} is {self.since_grown}")
        if not data:
            if not torch.equal(self.exact.pos, row.pos):
                raise ValueError("its exact tokens are others than it names")
            return
        blank = ctx.empty(1, heads, 2 * c, ctx.config.head_dim).zero_()  # two chunks, of which one is a candidate
        pos = torch.arange(2 * c, dtype=torch.int32, device=ctx.device).expand(1, heads, 2 * c)
        length = pos.new_full((1, heads), 2 * c)
        like = spec.build(Kept(blank, blank, pos, length, length, length), 2, length[0, :, None].long() * 0, None, ctx)
        like["chunk_ids"] = pos[0, :, :1]
        if set(data) != {*like, *NUMBERS} or any(data[x].dim() or data[x].is_floating_point() for x in NUMBERS):
            raise ValueError("its chunk data is not of this store")
        n_chunks, n_candidates, top_k, first = (int(data[x]) for x in NUMBERS)
        if not (0 < top_k <= n_candidates <= n_chunks and first >= 0):
            raise ValueError("its numbers of chunks contradict each other")
        for name, x in like.items():
            sizes, at, rank = list(x.shape), spec.chunk_dim.get(name), spec.rank_dim.get(name)
            if at is not None:
                sizes[at] = n_chunks if sizes[at] == 2 else n_candidates
            if rank is not None:  # a longer text may have a higher one
                sizes[rank] = data["a"].shape[-1]
            found, is_float = data[name], x.is_floating_point()  # a model in another precision may load the file
            if list(found.shape) != sizes or (not found.is_floating_point() if is_float else found.dtype != x.dtype):
                raise ValueError(f"{name} is of another shape or type")
            if is_float and not found.isfinite().all():
                raise ValueError(f"{name} holds values that are no numbers")
        in_chunks = first + data["chunk_ids"][..., None] * c + torch.arange(c, device=ctx.device)
        held = torch.cat((in_chunks.flatten(1)[None].to(torch.int32), self.exact.pos), 2).sort(-1).values
        if not torch.equal(held, row.pos):
            raise ValueError("its chunks do not hold the tokens that it names")

    def select(self, index: Tensor) -> ChunkState:
        raise ValueError("single tokens cannot be taken out of chunks")

    def tensors(self) -> dict[str, Tensor]:
        exact = {f"near_{name}": getattr(self.exact, name) for name in EXACT_FIELDS}
        return exact | {name: x[None] for name, x in self.chunk_data.items()} | {GROWN: torch.tensor(self.since_grown)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ChunkState:
        exact = Kept(*(tensors[f"near_{name}"] for name in EXACT_FIELDS))
        data = {name: x[0] for name, x in tensors.items() if not name.startswith("near_") and name != GROWN}
        data = {OLD_TENSOR_NAMES.get(name, name): x for name, x in data.items()}
        return cls(exact, data, int(tensors.get(GROWN, 0)))  # files of nanokv 0.1 do not have it


@dataclass(frozen=True, kw_only=True)
class Chunked(StoreSpec):
    """The options of every store of chunks.

    chunk   tokens that are read together.
    budget  tokens per KV head that a step reads beside the exact ones, or a percentage of the prompt (at least 256).
    local   chunks at the prompt's end that stay exact.
    reuse   whether chunks that a step has read stay in the buffer for the next one.
    grow    after so many new tokens they become chunks as well; 0: they stay exact.
    """

    chunk: int = 8
    budget: int | str = "1.5625%"
    local: int = 4
    reuse: bool = True
    grow: int = 0
    state_type = ChunkState
    selects_per_step = True
    kernels = ("fetch_chunks",)
    chunk_dim: ClassVar[Mapping[str, int]]  # name of chunk data → the dim that counts chunks
    rank_dim: ClassVar[Mapping[str, int]] = {}  # name of chunk data → the dim that is the rank of factors

    def __post_init__(self):
        given = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(Chunked))
        if self.chunk < 1 or self.local < 0 or self.grow < 0 or 0 < self.grow < self.chunk:
            raise ValueError(f"{given}; chunk is at least 1 token, local at least 0 chunks, grow 0 or at least a chunk")
        text = self.budget
        percent = isinstance(text, str) and re.fullmatch(r"[0-9]*\.?[0-9]+%", text) is not None
        if not (0 < float(text[:-1]) <= 100 if percent else isinstance(text, int) and text >= 1):
            raise ValueError(f"{given}; budget is a number of tokens such as 256, or percent of the prompt such as 2%")

    def incompatible_policy(self, policy: Policy) -> str:
        if policy.demotes or policy.positions_by_chunk:
            return super().incompatible_policy(policy)
        return "" if policy.keeps_all_or_edges else "evicts single tokens of the prompt, and the others form no chunks"

    def incompatible_model(self, config: Any) -> str:
        if self.grow and config.sliding_window:
            return "tokens leave this model's own sliding window, so new ones need not become chunks: leave grow out"
        return ""

    def notice(self, n: int) -> str:
        return "" if self.sizes(n)[0] else f"{n} tokens are too few for chunks to choose from, so all stay exact"

    def exact_room(self, ahead: int) -> int:
        """Slots for the exact tokens among `ahead` new ones."""
        return min(ahead, self.grow + self.chunk) if self.grow else ahead

    def n_outliers(self, n_chunks: int) -> int:
        """How many chunks of each head stay exact beside the local ones."""
        return 0

    def sizes(self, n: int) -> tuple[int, int, int]:
        """For a prompt of n tokens: chunks, candidates that each head chooses from, chunks that a step reads. (0, 0,
        0): too short.
        """
        chunks = max(0, n // self.chunk - self.local)
        candidates = chunks - self.n_outliers(chunks)
        budget = self.budget
        if isinstance(budget, str):
            budget = max(MIN_BUDGET, int(n * float(budget[:-1]) / 100))
        top_k = -(-budget // self.chunk)
        return (chunks, candidates, top_k) if 0 < top_k <= candidates else (0, 0, 0)

    def host_bytes(self, config: Any, dtype: torch.dtype, kept: int, ahead: int) -> int:
        chunks = self.sizes(kept)[0]
        later = ahead // self.chunk if self.grow and chunks else 0
        width = config.num_key_value_heads * config.head_dim * dtype.itemsize * len(self.on_host)
        return (chunks + later) * self.chunk * width

    @property
    def on_host(self) -> tuple[str, ...]:
        """Names of the chunk data that lies in the host's memory; each has a row per token as wide as a head."""
        return ()

    @abstractmethod
    def outlier_chunks(self, kept: Kept, chunks: int) -> Tensor:
        """(Hkv,m): the chunks of a whole prompt that stay exact, ascending."""

    @abstractmethod
    def build(
        self, kept: Kept, chunks: int, candidates: Tensor, prompt_data: Mapping[str, Tensor] | None, ctx: Context
    ) -> dict[str, Tensor]:
        """The chunk data of one row's first `chunks` chunks; candidates (Hkv,L) are those that a step may choose.

        prompt_data: the chunk data of the prompt, where these chunks are of later tokens.
        """

    def split(self, r: Kept, ctx: Context) -> ChunkState:
        """One row as exact tokens and chunks. There are no chunks where the row is short, or no whole prompt."""
        if r.state is not None:
            # a file may come from a run that held another type; scales and zero points are fp16 in every run
            data = {
                name: x.to(ctx.dtype) if x.is_floating_point() and name not in ("scale", "zero") else x
                for name, x in r.state.chunk_data.items()
            }
            return replace(r.state, exact=replace(r.state.exact, layer_score=r.layer_score), chunk_data=data)
        r = replace(r, k=r.k.to(ctx.dtype), v=r.v.to(ctx.dtype))
        (heads, n), window = r.pos.shape[1:], ctx.sliding_window
        grows = bool((r.limit < 0).all()) and bool((r.length == n).all())
        contiguous = n > 0 and grows and bool((r.pos[..., -1] - r.pos[..., 0] == n - 1).all())
        is_prompt = contiguous and (int(r.pos[0, 0, 0]) == 0 or (window is not None and n >= window - 1))
        chunks, n_candidates, top_k = self.sizes(n) if is_prompt else (0, 0, 0)
        if not chunks:
            return ChunkState(r, {})
        exact = self.outlier_chunks(r, chunks)
        is_exact = torch.zeros(heads, chunks, dtype=torch.bool, device=r.pos.device).scatter(1, exact, True)
        candidates = (~is_exact).nonzero()[:, 1].view(heads, n_candidates)
        number = r.pos.new_tensor  # makes a 0-d int32 tensor
        data = self.build(r, chunks, candidates, None, ctx) | {
            "chunk_ids": candidates.to(torch.int32),
            "first_pos": r.pos[0, 0, 0],
            "n_candidates": number(n_candidates),
            "top_k": number(top_k),
            "n_chunks": number(chunks),
        }
        in_outliers = exact[..., None] * self.chunk + torch.arange(self.chunk, device=exact.device)
        behind = torch.arange(chunks * self.chunk, n, device=exact.device).expand(heads, -1)
        index = torch.cat((in_outliers.flatten(1), behind), 1)[None]
        k, v, pos = ctx.ops.compact(r.k, r.v, r.pos, index)
        exact = Kept(k, v, pos, torch.full_like(r.length, index.shape[2]), r.limit, r.sink, layer_score=r.layer_score)
        return ChunkState(exact, data)

    def prepack(self, kept: Kept, ctx: Context) -> Kept:
        state = self.split(kept, ctx)
        if not state.chunk_data:
            return kept
        data = {name: x.cpu() if name in self.on_host else x for name, x in state.chunk_data.items()}
        return replace(state.exact, state=ChunkState(_cloned(state.exact), data))

    @abstractmethod
    def chunk_bytes(self, config: Any, itemsize: int, chunks: int, candidates: int, n: int) -> int:
        """Bytes on the device of the chunk data of one row in one layer."""

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        """The cost of a generated token; `device_bytes` adds the prompt's."""
        per_head = 2 * config.head_dim * dtype.itemsize + 4
        return config.num_key_value_heads * per_head, config.num_key_value_heads * SLOT_COUNTERS

    def device_bytes(
        self, config: Any, dtype: torch.dtype, cost: tuple[float, int], kept: int, ahead: int, demoted: int
    ) -> float:
        (token, fixed), (chunks, candidates, top_k) = cost, self.sizes(kept)
        exact, heads = kept - candidates * self.chunk, config.num_key_value_heads
        if not chunks:
            return (exact + ahead) * token + fixed
        buffer = top_k * heads * (2 * self.chunk * config.head_dim * dtype.itemsize + 4)
        later = ahead // self.chunk if self.grow else 0  # chunks of generated tokens
        data = self.chunk_bytes(config, dtype.itemsize, chunks + later, candidates + later, kept)
        numbers = heads * (candidates + later) * 4 + 4 * 4
        return (exact + self.exact_room(ahead)) * token + fixed + data + numbers + buffer


class ChunkStore(ABC):
    """Exact tokens in slots, chunk data of all rows, and the buffer.

    Rows may have different chunk counts; shorter rows are padded, and padding is masked out of the top-k. A single
    token reads the best chunks, a turn of several tokens reads all. Layers that share this store share its buffer.
    """

    lossless_prefix: int | None = 0
    refill_ends_capture = False
    k_names: tuple[str, ...] = ()  # chunk data that holds keys
    v_names: tuple[str, ...] = ()  # chunk data that holds values

    def __init__(self, rows: list[Kept], policy: Policy, room: int, ctx: Context, spec: Chunked):
        self.policy, self.ctx, self.spec = policy, ctx, spec
        states = [spec.split(r, ctx) for r in rows]
        self.since_grown = states[0].since_grown  # the same in all rows
        self._allocate(states, room)

    def _allocate(self, rows: list[ChunkState], room: int) -> None:
        """Allocate memory for the exact tokens, the chunks and the buffer of all rows, and fill it."""
        ctx, data = self.ctx, [r.chunk_data for r in rows]
        self.top_k_of, self.n_candidates_of = (
            [int(d[name]) if d else 0 for d in data] for name in ("top_k", "n_candidates")
        )
        self.exact, self.n_candidates, self.top_k = self._allocate_exact([r.exact for r in rows], room), 0, 0
        if not any(data):
            return
        self.top_k, self.n_candidates = max(self.top_k_of), max(self.n_candidates_of)
        self.uniform = min(self.top_k_of) == self.top_k and min(self.n_candidates_of) == self.n_candidates
        self.shapes = [{name: x.shape for name, x in d.items()} for d in data]
        names = next(d for d in data if d)
        self.chunk_data = {name: self._stack(name, [d.get(name) for d in data]) for name in names}
        heads, width = ctx.config.num_key_value_heads, self.spec.chunk * ctx.config.head_dim
        nothing = -1 - torch.arange(self.top_k, dtype=torch.int32, device=ctx.device)
        self.buffered_ids = nothing.expand(len(rows), heads, -1).clone()  # which chunk each place of the buffer holds
        self.keys, self.values = (ctx.empty(len(rows), heads, self.top_k, width).zero_() for _ in range(2))

    def _allocate_exact(self, rows: list[Kept], room: int) -> SlotStore:
        self.room = room
        room = self.spec.exact_room(room) if all(self.n_candidates_of) else room
        return SlotStore(rows, self.policy, room, self.ctx, plain_codecs(self.ctx))

    @property
    def until_maintenance(self) -> int | None:
        return self.spec.grow - self.since_grown if self.spec.grow else None

    @property
    def needs_host_sync(self) -> bool:
        """Whether the host must read chunk ids during a step, because no kernel fetches on the device."""
        looks_up = bool(self.host_tensors()) or self.spec.reuse
        return self.n_candidates > 0 and looks_up and self.ctx.device.type != "cpu" and not self.ctx.ops.device_gather

    # ---- what a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, q: Tensor, visible: Tensor | None) -> Tensor:
        """(B,Hkv,L): the score of each candidate chunk for a query (B,H,1,D). visible (B,Hkv,L): which chunks exist."""

    @abstractmethod
    def gather(self, chunk_ids: Tensor, is_new: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Write keys and values of the chunks (B,Hkv,k) into (B,Hkv,k,chunk·D); only where `is_new` if that is given.
        What stands at negative ids does not matter, as long as it is a number.
        """

    # ---- rows in, rows out --------------------------------------------------------------------------------------------

    def _stack(self, name: str, rows: Sequence[Tensor | None]) -> Tensor:
        """One kind of chunk data of every row, padded with zeros to the largest."""
        there = [x for x in rows if x is not None]
        size = [len(rows), *(max(n) for n in zip(*(x.shape for x in there), strict=True))]
        make = self.ctx.empty_on_host if name in self.spec.on_host else self.ctx.empty
        out = make(*size, dtype=there[0].dtype).zero_()
        for b, x in enumerate(rows):
            if x is not None:
                out[b][tuple(map(slice, x.shape))] = x
        return out

    def unpack(self) -> list[Kept]:
        exact = self.exact.unpack()
        if not self.n_candidates:
            return [r.with_state(ChunkState(_cloned(r), {}, self.since_grown)) for r in exact]
        ids, c = self.chunk_data["chunk_ids"], self.spec.chunk
        positions = self._positions(ids)
        keys, values = self._gather_all(ids)
        rows = []
        for b, r in enumerate(exact):
            state = ChunkState(_cloned(r), {}, self.since_grown)
            if not self.n_candidates_of[b]:
                rows.append(r.with_state(state))
                continue
            n = self.n_candidates_of[b] * c
            k, v, pos = (
                torch.cat((x, y[b : b + 1, :, :n]), 2)
                for x, y in ((r.k, keys), (r.v, values), (r.pos, positions.to(r.pos.dtype)))
            )
            index = pos.masked_fill(pos < 0, torch.iinfo(torch.int32).max).argsort(-1)
            k, v, pos = self.ctx.ops.compact(k, v, pos, index)
            state = replace(state, chunk_data={name: x.clone() for name, x in self._data_of(b).items()})
            rows.append(replace(r, k=k, v=v, pos=pos, length=r.length + n, state=state))
        return rows

    def _data_of(self, b: int) -> dict[str, Tensor]:
        """Row b's chunk data without padding."""
        return {name: self.chunk_data[name][b][tuple(map(slice, size))] for name, size in self.shapes[b].items()}

    def maintain(self, written: int) -> bool:
        self.room -= written
        if not self.spec.grow:
            return False
        self.since_grown += written
        if self.since_grown < self.spec.grow:
            return False
        self.since_grown = 0
        if not self.n_candidates:
            return False
        frozen, exact = self.slots.frozen, self.exact.unpack()
        self._allocate([self._grown(r, self._data_of(b)) for b, r in enumerate(exact)], self.room)
        if frozen:
            self.freeze()
        return True

    def _grown(self, r: Kept, data: dict[str, Tensor]) -> ChunkState:
        """One row after its oldest exact tokens behind the prompt have become chunks."""
        if not data:
            return ChunkState(r, data)
        c, old, (heads, n) = self.spec.chunk, int(data["n_chunks"]), r.pos.shape[1:]
        # this many first exact tokens are the prompt's outliers
        start = int((r.pos[0, 0] < data["first_pos"] + old * c).sum())
        new = max(0, (n - start) // c - self.spec.local)
        later = replace(r, k=r.k[:, :, start:], v=r.v[:, :, start:], pos=r.pos[:, :, start:])
        ids = torch.arange(new, device=r.pos.device).expand(heads, -1)
        made = self.spec.build(later, new, ids, data, self.ctx) | {"chunk_ids": (old + ids).to(torch.int32)}
        data |= {
            name: torch.cat((data[name], x.to(data[name].device)), self.spec.chunk_dim[name])
            for name, x in made.items()
        }
        data |= {name: data[name] + new for name in ("n_candidates", "n_chunks")}
        k, v, pos = (torch.cat((x[:, :, :start], x[:, :, start + new * c :]), 2) for x in (r.k, r.v, r.pos))
        return ChunkState(replace(r, k=k, v=v, pos=pos, length=r.length - new * c), data)

    def reserve(self, room: int) -> bool:
        frozen = self.slots.frozen
        self.exact = self._allocate_exact(self.exact.unpack(), room)
        if frozen:
            self.freeze()
        return True

    def refill(self, rows: list[Kept], room: int) -> bool:
        return False

    # ---- a step -------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> Slots:
        return self.exact.slots

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.exact.append(k, v, pos)

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        self.exact.extend(k, v, pos)

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = [self.exact.read(q, pos)[:2]] if self.slots.max_used else []  # with local=0 all may lie in chunks
        if self.n_candidates:
            parts += [self._read_best(q, pos)] if q.shape[2] == 1 else self._read_all(q, pos)
        return *(merge(parts) if len(parts) > 1 else parts[0]), None

    def _read_best(self, q: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        ids, is_new = self.assign_buffer(self.choose(q, pos))
        self.gather(ids, is_new if self.spec.reuse else None, self.keys, self.values)
        self.buffered_ids.copy_(ids)
        return self._attend(q, pos, ids, self.keys, self.values)

    def choose(self, q: Tensor, pos: Tensor) -> Tensor:
        """(B,Hkv,k): the chunks that this step reads. A row that reads fewer has distinct negative ids behind them."""
        visible = self._visible(pos)
        score = self.score(q, visible)
        score = score if visible is None else score.masked_fill(~visible, -torch.inf)
        best = score.topk(self.top_k, -1).indices
        rank = torch.arange(self.top_k, dtype=torch.int32, device=q.device)
        ids = self.chunk_data["chunk_ids"].gather(2, best)
        if visible is None:
            return ids
        reads = visible.gather(2, best) & (rank < self.chunk_data["top_k"][:, None, None])
        return torch.where(reads, ids, -1 - rank)

    def _visible(self, pos: Tensor) -> Tensor | None:
        """bool (B,Hkv,L): which candidates a row has and the model's own window still shows; None: all."""
        window, ids = self.slots.sliding_window, self.chunk_data["chunk_ids"]
        if self.uniform and window is None:
            return None
        there = torch.arange(ids.shape[2], device=ids.device) < self.chunk_data["n_candidates"][:, None, None]
        if window is None:
            return there.expand_as(ids)
        last = self.chunk_data["first_pos"][:, None, None] + (ids + 1) * self.spec.chunk - 1
        return there & (last > pos[:, :, None] - window)

    def assign_buffer(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Wanted chunks (B,Hkv,k) → which chunk each place of the buffer holds from now on, and whether it is new
        there.

        A chunk that is in the buffer stays where it is. Each other one takes a place that is no longer wanted.
        """
        same = self.buffered_ids[..., :, None] == wanted[..., None, :]  # (B,Hkv,place,wanted)
        is_new, missing = ~same.any(3), ~same.any(2)
        into, which = (torch.argsort(x.to(torch.int8), stable=True, dim=-1, descending=True) for x in (is_new, missing))
        ids = torch.where(missing.gather(2, which), wanted.gather(2, which), self.buffered_ids.gather(2, into))
        return self.buffered_ids.scatter(2, into, ids), is_new

    def _read_all(self, q: Tensor, pos: Tensor) -> list[tuple[Tensor, Tensor]]:
        """All chunks, block by block: for the tokens of a turn that costs less than a choice for each of them."""
        chunk_ids, parts = self.chunk_data["chunk_ids"], []
        for a in range(0, self.n_candidates, GATHER_BLOCK):
            ids = chunk_ids[:, :, a : a + GATHER_BLOCK]
            n_candidates = self.chunk_data["n_candidates"][:, None, None]
            there = a + torch.arange(ids.shape[2], device=ids.device) < n_candidates
            ids = ids if self.uniform else torch.where(there, ids, -1)
            keys, values = (self.ctx.empty(*ids.shape, self.keys.shape[3]) for _ in range(2))
            self.gather(ids, None, keys, values)
            parts.append(self._attend(q, pos, ids, keys, values))
        return parts

    def _gather_all(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunks, (B,Hkv,k·chunk,D)."""
        keys, values = (self.ctx.empty(*ids.shape, self.keys.shape[3]) for _ in range(2))
        self.gather(ids, None, keys, values)
        return self._tokens(keys), self._tokens(values)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B,Hkv,k,chunk·D) → (B,Hkv,k·chunk,D)."""
        return x.unflatten(3, (self.spec.chunk, -1)).flatten(2, 3)

    def _positions(self, ids: Tensor) -> Tensor:
        """Chunks (B,Hkv,k) → the positions of their tokens (B,Hkv,k·chunk)."""
        c = self.spec.chunk
        offset = ids[..., None] * c + torch.arange(c, device=ids.device)
        return self.chunk_data["first_pos"][:, None, None] + offset.flatten(2)

    def _attend(self, q: Tensor, pos: Tensor, ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over the chunks with ids ≥ 0."""
        window = self.slots.sliding_window
        visible = None if self.uniform and window is None else (ids >= 0).repeat_interleave(self.spec.chunk, 2)
        k, v, key_pos = self._tokens(keys), self._tokens(values), self._positions(ids).to(torch.int32)
        return self.ctx.ops.decode(q, k, v, visible, key_pos, pos, window)[:2]

    def freeze(self) -> None:
        self.exact.freeze()

    # ---- the receipt --------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        buffer = [self.buffered_ids, self.keys, self.values] if self.n_candidates else []
        return [*self.exact.tensors(), *buffer, *(x for name, x in self._data() if name not in self.spec.on_host)]

    def host_tensors(self) -> list[Tensor]:
        return [x for name, x in self._data() if name in self.spec.on_host]

    def _data(self) -> list[tuple[str, Tensor]]:
        return list(self.chunk_data.items()) if self.n_candidates else []

    @property
    def length(self) -> Tensor:
        if not self.n_candidates:
            return self.exact.length
        return self.exact.length + self.chunk_data["n_candidates"][:, None] * self.spec.chunk

    def used_bytes(self) -> tuple[int, int, int]:
        (k, v, bookkeeping), on_host = self.exact.used_bytes(), self.spec.on_host
        here = {name: x.nbytes for name, x in self._data() if name not in on_host}
        keys, values = (sum(here.get(name, 0) for name in names) for names in (self.k_names, self.v_names))
        others = sum(x.nbytes for x in self.tensors()) - sum(x.nbytes for x in self.exact.tensors()) - keys - values
        return k + keys, v + values, bookkeeping + others


def _cloned(r: Kept) -> Kept:
    """A row's exact tokens, in memory of their own, as the part of a ChunkState."""
    return Kept(*(getattr(r, name).clone() for name in EXACT_FIELDS))
