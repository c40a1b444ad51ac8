"""The cache while decoding. Each layer that owns storage has one store, with fixed slots for B rows.

A single new token is stored first and then attends to everything, itself included. Several tokens at once, a piece of a
turn, attend to what was stored before and causally to each other, and are stored afterwards. `next_piece` says how many
may come at once. After `defer`, new tokens attend in this way too but wait: `store_deferred` stores the first ones, and
`release` drops the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan
from nanokv.cache.protocol import Store
from nanokv.cache.report import LayerReport, Report, storages
from nanokv.cache.rescore import QueryBuffer, stored_as_prompt
from nanokv.model.rope import rotate_more
from nanokv.stores.shared import SharedPrefix


class KVCache:
    """One plan decides how all rows lie in memory. Each row's own plan, fitted to its prompt, decides what stays of
    that row.
    """

    def __init__(
        self,
        plans: list[Plan],
        stores: dict[int, Store],
        layer_scores: dict[int, list[float]],
        room: int,
        ctx: Context,
        shared: int = 0,
    ):
        self.plans, self.plan, self.stores, self.layer_scores = plans, plans[0], stores, layer_scores
        self.room, self.ctx, self.shared = room, ctx, shared
        self.since_rescore = 0  # tokens
        self.layout = object()  # another one after each change of the stores' memory, which makes a recorded step stale
        self.layers: list[Owner | Reader] = []
        plan, policy = self.plan, self.plan.policy
        rows = next(iter(stores.values())).slots.cursor.shape[0]
        for i in range(ctx.config.num_hidden_layers):
            owner, queries = plan.owner(i), None
            if policy.rescore_every and not policy.decode_request:
                queries = QueryBuffer(policy.rescore_request.buffered_queries, rows, ctx)
            if owner == i:
                self.layers.append(Owner(stores[i], plan, i, ctx, queries))
            else:
                self.layers.append(Reader(self.layers[owner], plan.last_reader(owner) == i, queries))

    @classmethod
    def pack(cls, plans: list[Plan], rows: list[dict[int, Kept]], room: int, ctx: Context, shared: int = 0) -> KVCache:
        """A cache of what each row keeps (layer → Kept), with slots for `room` more tokens in heads that grow. The first
        `shared` tokens of the texts are the same in all rows and are stored once; only the first row need hold them.

        Takes each layer out of `rows` as it packs it, so that no layer is held twice; pass copies of the dicts to
        keep them.
        """
        stores, scores, plan = {}, {}, plans[0]
        for owner in sorted(rows[0]):
            kept = [row.pop(owner) for row in rows]
            scores[owner] = [k.layer_score for k in kept]
            store = plan.store.at(owner, ctx.config.num_hidden_layers)
            given = plan.policy, plan.slots_ahead(room), ctx.of_layer(owner)
            stores[owner] = SharedPrefix(store, kept, shared, *given) if shared else store.pack(kept, *given)
            plan.store.link(list(stores.values()))
        return cls(plans, stores, scores, room, ctx, shared)

    def next_piece(self, n: int, seen: Sequence[int]) -> int:
        """How many of n tokens may come at once: one if the policy scores each step or evicts by score. Otherwise a piece ends where the
        store's next `maintain`, the policy's next rescore, or the end of a chunk of positions is due, whichever comes
        first. seen: tokens of each row's text so far.
        """
        policy = self.plan.policy
        if n == 1 or policy.decode_request or policy.eviction == "score":
            return 1
        if policy.positions_by_chunk:
            n = min(n, *(policy.chunk_size - s % policy.chunk_size for s in seen))
        n = min(n, *(store.until_maintenance or n for store in self.stores.values()))
        return min(n, policy.rescore_every - self.since_rescore) if policy.rescore_every else n

    def check_room(self, n: int) -> None:
        """Raise ValueError if n tokens are more than `room`: heads that grow would have no slots for them."""
        if n > self.room:
            raise ValueError(f"the cache has room for {self.room} more tokens and {n} come; reserve() more first")

    def reserve(self, room: int) -> None:
        """Make room for `room` more tokens. A store that cannot extend its memory is packed again with what it holds."""
        if room <= self.room:
            return
        ahead = self.plan.slots_ahead(room, self.since_rescore)
        for i, store in self.stores.items():
            if store.reserve(ahead):
                self.layout = object()
            else:
                self._pack(i, store.unpack(), ahead)
        self.room = room

    def _pack(self, i: int, rows: list[Kept], ahead: int) -> None:
        self.layout = object()
        frozen = self.stores[i].slots.frozen
        store = self.plan.store.at(i, self.ctx.config.num_hidden_layers)
        self.stores[i] = self.layers[i].store = store.pack(rows, self.plan.policy, ahead, self.ctx.of_layer(i))
        if frozen:
            self.stores[i].freeze()
        self.plan.store.link(list(self.stores.values()))

    def maintain(
        self, written: int, seen: Sequence[int], tokens: Callable[[], list[Tensor] | None] = lambda: None
    ) -> None:
        """Upkeep between steps: `written` tokens have come, and each row's text is now `seen` long.

        tokens() gives each row's token ids so far (seen,), or None where they are not known. It is called only when
        the policy rescores.
        """
        for store in self.stores.values():
            if store.maintain(written):
                self.layout = object()
        self.since_rescore += written
        if self.plan.policy.rescore_every and self.since_rescore >= self.plan.policy.rescore_every:
            self.since_rescore = 0
            self._rescore(seen, tokens())

    def _rescore(self, seen: Sequence[int], tokens: Sequence[Tensor] | None) -> None:
        """Ask the policy what stays of what each layer holds, as it was asked after the prompt."""
        ahead = self.plan.slots_ahead(self.room)
        for i in self.stores:
            prompts = self._stored_as_prompts(i, seen, tokens)
            self._refill(i, [plan.policy.keep(p) for plan, p in zip(self.plans, prompts, strict=True)], ahead)

    def _stored_as_prompts(self, i: int, seen: Sequence[int], tokens: Sequence[Tensor] | None) -> list:
        """What layer i holds, per row, as the policy sees it."""
        buffers = [x.queries for x in self.layers if x.owner is self.layers[i] and x.queries]
        return [
            stored_as_prompt(kept, i, b, seen, buffers, self.plan, self.ctx, tokens[b] if tokens else None)
            for b, kept in enumerate(self.stores[i].unpack())
        ]

    def _refill(self, i: int, rows: list[Kept], ahead: int) -> None:
        store = self.stores[i]
        if not store.refill(rows, ahead):
            self._pack(i, rows, ahead)
        elif store.refill_ends_capture:
            self.layout = object()

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i hold what row rows[i] holds."""
        ahead = self.plan.slots_ahead(self.room, self.since_rescore)
        for i, store in self.stores.items():
            if self.shared:
                store.reorder(rows, ahead)
                self.layout = object()
            else:
                held = store.unpack()
                self._pack(i, [held[row] for row in rows], ahead)
        for layer in self.layers:
            if layer.queries:
                layer.queries.reorder(rows)

    def defer(self) -> None:
        """From now on new tokens attend to what is stored and causally to each other, and are not stored."""
        for layer in self._owners:
            layer.defers = True

    def store_deferred(self, n: int, pos: Tensor) -> None:
        """Store the first n of the deferred tokens, at pos (B,n). Call `maintain` before the next ones."""
        for layer in self._owners:
            layer.store_unstored(n, pos)

    def release(self) -> None:
        """Forget the tokens that are still deferred, and store new ones again."""
        for layer in self._owners:
            layer.defers, layer.unstored = False, None

    @property
    def _owners(self) -> list[Owner]:
        return [layer for layer in self.layers if layer.owns]

    @property
    def needs_host_sync(self) -> bool:
        """Whether a step waits for the host, so that it cannot be compiled or captured."""
        return any(store.needs_host_sync for store in self.stores.values())

    def freeze(self) -> None:
        """From now on every step has the same shapes, as a compiled or captured step needs. ValueError if a step
        waits for the host.
        """
        if self.needs_host_sync:
            raise ValueError(
                f"a step over {self.plan} waits for the host and cannot be compiled or captured; use --runner eager, or for "
                "shadow and quest --backend triton"
            )
        for store in self.stores.values():
            store.freeze()

    def report(self, seen: list[int]) -> Report:
        """The receipt. seen: how many tokens each row's text has, held or evicted."""
        cfg, dtype = self.ctx.config, self.ctx.dtype
        lines, used, counted, on_host = [], 0, {}, {}
        for i in range(cfg.num_hidden_layers):
            owner, buffer = self.plan.owner(i), self.layers[i].queries
            store, queries = self.stores[owner], [buffer.q] if buffer else []
            before = sum(counted.values())
            counted |= storages([*(store.tensors() if owner == i else []), *queries])
            on_host |= storages(store.host_tensors())
            k, v, bookkeeping = store.used_bytes()
            elements = int((store.stored if self.shared else store.length).sum()) * cfg.head_dim
            size = sum(counted.values()) - before
            lines.append(LayerReport(i, owner, size, store.length.tolist(), 8 * k / elements, 8 * v / elements))
            used += (k + v + bookkeeping if owner == i else 0) + sum(x.nbytes for x in queries)
        used += sum(x.nbytes for x in self.ctx.constants.values())
        heads = cfg.num_hidden_layers * cfg.num_key_value_heads
        full = sum(seen) * heads * 2 * cfg.head_dim * dtype.itemsize
        return Report(sum(x.bytes for x in lines), used, sum(on_host.values()), full, seen, lines, self.shared)


class Owner:
    """A layer with storage of its own; later layers may read it too."""

    owns = True

    def __init__(self, store: Store, plan: Plan, index: int, ctx: Context, queries: QueryBuffer | None):
        self.store, self.policy, self.queries, self.ctx = store, plan.policy, queries, ctx
        self.ops, self.dtype = ctx.ops, ctx.dtype
        self.owner = self
        self.sliding_window = ctx.config.window(index)
        # the owner attends first, so it is the last reader only if no other layer reads it
        self.is_last_reader = plan.last_reader(index) == index
        self.defers = False  # whether new tokens wait for `KVCache.store_deferred`
        # k and v (B,Hkv,n,D) that wait: a piece of a turn until its last reader has attended, or what `defer` holds back
        self.unstored: tuple[Tensor, Tensor] | None = None
        self.score_planes: list[Tensor] = []  # in this step, one per reader that has attended

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        k, v = k.to(self.dtype), v.to(self.dtype)
        if q.shape[2] == 1 and not self.defers:
            self.store.append(k, v, pos)
        elif self.unstored is None:
            self.unstored = k, v
        else:
            self.unstored = torch.cat((self.unstored[0], k), 2), torch.cat((self.unstored[1], v), 2)
        return self.read(q, pos, self.is_last_reader, self.queries)

    def read(self, q: Tensor, pos: Tensor, is_last_reader: bool, queries: QueryBuffer | None) -> Tensor:
        """One reader's attention; after that of the last reader, what is due then. The model for prompts runs a turn too, so q
        may have another dtype than the cache.
        """
        own_q = q.to(self.dtype)
        if queries is not None:
            queries.push(own_q, pos)
        in_cache = self.policy.positions_in_cache and self.store.slots.n_sink
        if self.policy.positions_by_chunk:
            out, lse, scores = *self._read_by_chunk(own_q, pos), None
        else:
            out, lse, scores = self.store.read(own_q, pos, self._sink_queries(own_q, pos) if in_cache else None)
        if self.unstored is not None:
            before = self.unstored[0].shape[2] - q.shape[2]
            out, _ = merge([(out, lse), self.ops.turn(own_q, *self.unstored, before, self.sliding_window)])
        elif scores is not None:
            self.score_planes.append(scores)
        if is_last_reader:
            self._all_have_attended(q.shape[2], pos)
        return out.to(q.dtype)

    def _all_have_attended(self, n: int, pos: Tensor) -> None:
        """Store the n tokens at pos (B,n) that wait for their last reader, or give the policy the scores of this step."""
        if self.unstored is not None:
            if not self.defers:
                self.store_unstored(n, pos)
        elif self.score_planes:
            scores = torch.stack(self.score_planes) if len(self.score_planes) > 1 else self.score_planes[0][None]
            self.store.slots.set_running_scores(self.policy.update_scores(self.store.slots, scores, pos))
            self.score_planes = []

    def store_unstored(self, n: int, pos: Tensor) -> None:
        """Store the first n of the tokens that are not stored yet, at pos (B,n)."""
        k, v = (x[:, :, :n] for x in self.unstored)
        (self.store.append if n == 1 else self.store.extend)(k, v, pos)
        rest = tuple(x[:, :, n:] for x in self.unstored)
        self.unstored = rest if rest[0].shape[2] else None

    def _read_by_chunk(self, q: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of q (B,H,T,D), which is rotated anew for each chunk of stored keys → out, lse."""
        policy = self.policy

        def rotated(first: int) -> Tensor:
            return rotate_more(q, policy.shift(pos, first), self.ctx.inv_freq)

        return self.store.read_by_chunk(rotated, policy.chunk_size, pos)

    def _sink_queries(self, q: Tensor, pos: Tensor) -> Tensor:
        """The queries rotated back to their place in the cache, as if no evicted token lay between the sinks and the
        others.
        """
        s, T = self.store.slots, q.shape[2]
        # how many tokens stand before these: `length` counts these too if they are stored
        before = s.length[:, :1] + (0 if self.unstored is None else self.unstored[0].shape[2]) - T
        gap = before + torch.arange(T, device=pos.device) - pos
        # heads whose sinks have left the model's sliding window rotate nothing back
        gap = torch.where(s.sink[:, :1] < s.n_sink, 0, gap)
        return rotate_more(q, gap, self.ctx.inv_freq)


class Reader:
    """A layer without storage, which reads an earlier layer's."""

    owns = False

    def __init__(self, owner: Owner, is_last_reader: bool, queries: QueryBuffer | None):
        self.owner, self.is_last_reader, self.queries = owner, is_last_reader, queries

    def attend(self, q: Tensor, k: None, v: None, pos: Tensor) -> Tensor:
        return self.owner.read(q, pos, self.is_last_reader, self.queries)
