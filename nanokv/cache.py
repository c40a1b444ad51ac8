"""The decode side of a cache: static slots for B rows, one store per owning layer, and the receipt of what it holds.

Contains no prefill. One new token: store it, then read everything. More than one (a new turn): they see what was stored and themselves
causally, and only then are stored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from nanokv.contract import Context, Kept, Store
from nanokv.ops import merge
from nanokv.plan import Plan


class KVCache:
    def __init__(self, plan: Plan, stores: dict[int, Store], scores: dict[int, list[float]], room: int, ctx: Context):
        self.plan, self.stores, self.scores, self.room, self.ctx = plan, stores, scores, room, ctx
        self.layers: list[Owner | Reader] = []
        for i in range(ctx.config.num_hidden_layers):
            owner = plan.owner(i)
            last = plan.last_reader(owner) == i
            self.layers.append(Owner(stores[i], plan, i, ctx) if owner == i else Reader(self.layers[owner], last))

    @classmethod
    def pack(cls, plan: Plan, rows: list[dict[int, Kept]], room: int, ctx: Context) -> KVCache:
        """A cache over the survivors of each row (owner → Kept), with slots for `room` more tokens in heads that grow.

        Takes the survivors out of `rows` layer by layer, so that no layer is held twice; pass copies of the dicts to keep them.
        """
        stores, scores = {}, {}
        for owner in sorted(rows[0]):
            kept = [row.pop(owner) for row in rows]
            scores[owner] = [k.score for k in kept]
            stores[owner] = plan.store.pack(kept, plan.keep, room, ctx)
        return cls(plan, stores, scores, room, ctx)

    def spend(self, n: int) -> None:
        """Note on the host that n tokens come; a full cache raises instead of overwriting what it promised to keep."""
        if n > self.room:
            raise ValueError(f"the cache has room for {self.room} more tokens and {n} come; reserve() more first")
        self.room -= n

    def reserve(self, room: int) -> None:
        """Make room for `room` tokens from here on. Reallocates the stores whose heads grow; what they hold stays."""
        if room <= self.room:
            return
        for i in self.stores:
            held = self.stores[i].unpack()
            self.stores[i] = self.layers[i].store = self.plan.store.pack(held, self.plan.keep, room, self.ctx)
        self.room = room

    def maintain(self, written: int) -> None:
        """Stores' upkeep between steps, on a schedule the host knows: `written` tokens just came."""
        for store in self.stores.values():
            store.maintain(written)

    def freeze(self) -> None:
        """From now on every step has the same shapes: for a compiled or captured step."""
        for store in self.stores.values():
            store.slots.freeze()

    def report(self, seen: list[int]) -> Report:
        """The receipt. seen: tokens of text that this cache stands for, per row."""
        cfg, dtype = self.ctx.config, self.ctx.dtype
        k_bits, v_bits = self.plan.store.bits(dtype)
        lines, held = [], []
        for i in range(cfg.num_hidden_layers):
            owner = self.plan.owner(i)
            store = self.stores[owner]
            length = store.slots.length.tolist()
            own = owner == i
            lines.append(LayerReport(i, owner, _nbytes(store.tensors()) if own else 0, length, k_bits, v_bits))
            held.append(store.live_bytes() if own else 0)
        heads = cfg.num_hidden_layers * cfg.num_key_value_heads
        full = sum(seen) * heads * 2 * cfg.head_dim * dtype.itemsize
        return Report(sum(x.bytes for x in lines), sum(held), 0, full, seen, lines)


class Owner:
    """A layer with storage of its own, possibly read by later layers too."""

    owns = True

    def __init__(self, store: Store, plan: Plan, index: int, ctx: Context):
        self.store, self.policy, self.ops, self.dtype = store, plan.keep, ctx.ops, ctx.dtype
        self.sliding_window = ctx.config.sliding_window
        self.alone = plan.last_reader(index) == index
        self.new: tuple[Tensor, Tensor] | None = None  # a turn's k, v, until the last reader has seen them
        self.heard: Tensor | None = None  # votes of the readers so far in this step

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        k, v = k.to(self.dtype), v.to(self.dtype)
        if q.shape[2] == 1:
            self.store.append(k, v, pos)
        else:
            self.new = (k, v)
        return self.answer(q, pos, last=self.alone)

    def answer(self, q: Tensor, pos: Tensor, last: bool) -> Tensor:
        """What one reader's queries get. A turn may come in the prefill's type; the cache keeps its own."""
        state = q.to(self.dtype)
        out, lse, votes = self.store.read(state, pos)
        if q.shape[2] > 1:
            out, _ = merge([(out, lse), self.ops.turn(state, *self.new, 0, self.sliding_window)])
            if last:
                self.store.extend(*self.new, pos)
                self.new = None
        elif votes is not None:
            self.heard = votes if self.heard is None else self.heard + votes
            if last:
                self.policy.watch(self.store.slots, self.heard, pos)
                self.heard = None
        return out.to(q.dtype)


class Reader:
    """A layer without storage: it asks another one's."""

    owns = False

    def __init__(self, owner: Owner, last: bool):
        self.owner, self.last = owner, last

    def attend(self, q: Tensor, k: None, v: None, pos: Tensor) -> Tensor:
        return self.owner.answer(q, pos, self.last)


@dataclass(frozen=True)
class LayerReport:
    layer: int
    owner: int
    bytes: int
    kept: list[list[int]]  # [row][KV head]: tokens held
    k_bits: float
    v_bits: float


@dataclass(frozen=True)
class Report:
    """The receipt. `bytes` counts every storage the cache holds on the device once; `full_bytes` is a dense cache of the same text."""

    bytes: int
    live_bytes: int
    host_bytes: int
    full_bytes: int
    seen: list[int]  # tokens of text that each row stands for
    layers: list[LayerReport]

    @property
    def ratio(self) -> float:
        return self.full_bytes / self.bytes

    @property
    def short(self) -> list[LayerReport]:
        """The layers in which some head holds less than the whole text."""
        return [x for x in self.layers if any(min(row) < n for row, n in zip(x.kept, self.seen, strict=True))]

    def as_dict(self, row: int = 0) -> dict:
        """For --json: `kept` per KV head is the row's own; bytes are of the whole cache, which all rows share."""
        totals = {k: getattr(self, k) for k in ("bytes", "live_bytes", "host_bytes", "full_bytes", "ratio")}
        return {**totals, "layers": [{**asdict(x), "kept": x.kept[row]} for x in self.layers]}

    def __str__(self) -> str:
        line = (
            f"kv: {mib(self.bytes)} of {mib(self.full_bytes)} dense ({self.ratio:.1f}x) · "
            f"K {self.layers[0].k_bits:.3g} V {self.layers[0].v_bits:.3g} bits/elem · "
        )
        total, layers = _span(self.seen), len(self.layers)
        if not self.short:
            line += f"all {total} tokens on {layers} of {layers} layers"
        else:
            held = _span([n for x in self.short for row in x.kept for n in row])
            line += f"{held} of {total} tokens on {len(self.short)} of {layers} layers"
        return f"{line} · host {mib(self.host_bytes)}"


def _span(numbers: list[int]) -> str:
    lo, hi = min(numbers), max(numbers)
    return f"{lo}" if lo == hi else f"{lo}–{hi}"


def mib(n: int) -> str:
    return "0 B" if n == 0 else f"{n / 2**20:.1f} MiB" if n < 2**30 else f"{n / 2**30:.2f} GiB"


def _nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each once: a view counts as all it keeps alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
