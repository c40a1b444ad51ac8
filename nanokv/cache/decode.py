"""The decode side of a cache: static slots for B rows, one store per owning layer, and the receipt of what it holds.

Contains no prefill. One new token: store it, then read everything. More than one (a new turn): they see what was stored and themselves
causally, and only then are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanokv.backends.base import merge
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.plan import Plan
from nanokv.cache.protocol import Context, Store
from nanokv.cache.report import LayerReport, Report, storages
from nanokv.cache.rescore import Tail
from nanokv.cache.scores import moments
from nanokv.model.rope import angles, rotate, unrotated


class KVCache:
    """One plan lays out all rows; each row's own, fitted to its prompt, says what stays of it."""

    def __init__(
        self, plans: list[Plan], stores: dict[int, Store], scores: dict[int, list[float]], room: int, ctx: Context
    ):
        plan = plans[0]
        self.plans, self.plan, self.stores, self.scores, self.room, self.ctx = plans, plan, stores, scores, room, ctx
        self.fresh = 0  # tokens since the policy looked last
        self.written = 0  # tokens since all stores were packed
        self.layout = 0  # how often memory or its division has changed: a step captured for the last one is stale
        self.layers: list[Owner | Reader] = []
        plan.place.link(list(stores.values()))
        rows = next(iter(stores.values())).slots.cursor.shape[0]
        for i in range(ctx.config.num_hidden_layers):
            owner = plan.owner(i)
            tail = Tail(plan.keep.again.tail, rows, ctx) if plan.keep.every and not plan.keep.watches else None
            if owner == i:
                self.layers.append(Owner(stores[i], plan, i, ctx, tail))
            else:
                self.layers.append(Reader(self.layers[owner], plan.last_reader(owner) == i, tail))

    @classmethod
    def pack(cls, plans: list[Plan], rows: list[dict[int, Kept]], room: int, ctx: Context) -> KVCache:
        """A cache over the survivors of each row (owner → Kept), with slots for `room` more tokens in heads that grow.

        Takes the survivors out of `rows` layer by layer, so that no layer is held twice; pass copies of the dicts to keep them.
        """
        stores, scores, plan = {}, {}, plans[0]
        for owner in sorted(rows[0]):
            kept = [row.pop(owner) for row in rows]
            scores[owner] = [k.score for k in kept]
            stores[owner] = plan.place.pack(plan.store, kept, plan.keep, plan.ahead(room), ctx)
        return cls(plans, stores, scores, room, ctx)

    def piece(self, n: int) -> int:
        """How many of n tokens may come at once: one if the policy watches each step, none beyond its next look."""
        keep, most = self.plan.keep, self.plan.store.most
        n = min(n, most - self.written % most) if most else n
        return 1 if keep.watches else min(n, keep.every - self.fresh) if keep.every else n

    def expect(self, n: int) -> None:
        """A full cache raises instead of overwriting what it promised to keep."""
        if n > self.room:
            raise ValueError(f"the cache has room for {self.room} more tokens and {n} come; reserve() more first")

    def reserve(self, room: int) -> None:
        """Make room for `room` tokens from here on. Reallocates the stores whose heads grow; what they hold stays."""
        if room <= self.room:
            return
        ahead = self.plan.ahead(room, self.fresh)
        for i, store in self.stores.items():
            if store.reserve(ahead):
                self.layout += 1
            else:
                self._pack(i, store.unpack(), ahead)
        self.room, self.written = room, 0

    def _pack(self, i: int, rows: list[Kept], ahead: int) -> None:
        self.layout += 1
        frozen = self.stores[i].slots.frozen
        packed = self.plan.place.pack(self.plan.store, rows, self.plan.keep, ahead, self.ctx)
        self.stores[i] = self.layers[i].store = packed
        if frozen:
            packed.freeze()
        self.plan.place.link(list(self.stores.values()))

    def maintain(self, written: int, seen: list[int]) -> None:
        """Upkeep between steps, on a schedule the host knows: `written` tokens just came, each row's text is `seen` long."""
        for store in self.stores.values():
            self.layout += bool(store.maintain(written))
        self.written += written
        self.fresh += written
        if self.plan.keep.every and self.fresh >= self.plan.keep.every:
            self.fresh = 0
            self.layout += 1
            for i in self.stores:
                self._look_again(i, seen)

    def _look_again(self, i: int, seen: list[int]) -> None:
        """Ask the policy what stays of what layer i holds, as it was asked after the prompt."""
        readers = [x for x in self.layers if x.of is self.layers[i]]
        held = self.stores[i].unpack()
        rows = [self.plans[b].keep.keep(self._prompt(i, b, k, readers, seen)) for b, k in enumerate(held)]
        ahead = self.plan.ahead(self.room)
        if not self.stores[i].refill(rows, ahead):
            self._pack(i, rows, ahead)

    def _prompt(self, i: int, b: int, kept: Kept, readers: list[Owner | Reader], seen: list[int]) -> Prompt:
        """Row b of what layer i holds, as the policy sees it, with what the last queries of all that read it say."""
        plan, config, ask = self.plan, self.ctx.config, self.plan.keep.again
        rank, owners = plan.rank(i), config.num_hidden_layers - len(plan.share)
        kept = kept.within(seen[b], config.sliding_window)
        visible = min(seen[b], config.sliding_window - 1) if config.sliding_window else seen[b]
        place = i, rank, owners, seen[b], visible
        tokens, ctx = (kept.k, kept.v, kept.pos, kept.votes), self.ctx
        found = Prompt(*place, *tokens, 0, ctx.ops, inv_freq=ctx.inv_freq, codes=kept.codes)
        if readers[0].tail is None or not ask.tail:
            return found
        tails = [x.tail.ordered(b, seen) for x in readers]  # (1,H,w,D) each
        if ask.rows:
            found.votes = torch.cat([self._heard(q, kept) for q in tails])
            found.n_votes = ask.rows
        if ask.moments is not None:
            pos = torch.arange(seen[b] - ask.tail, seen[b], device=self.ctx.device)[None]
            raw = [unrotated(q, pos, self.ctx.inv_freq) for q in tails]
            found.q_mean, found.q_cov = moments([(q.sum(2), q.transpose(-1, -2) @ q, q.shape[2]) for q in raw])
        return found

    def _heard(self, q: Tensor, kept: Kept) -> Tensor:
        """The votes of the last w queries (1,H,w,D) for kept keys, of which each head's last w are theirs → (1,Hkv,N)."""
        ask, (_, heads, n, _) = self.plan.keep.again, kept.k.shape
        votes = torch.zeros(1, heads, n, device=q.device)
        for h, group in enumerate(q.chunk(heads, 1)):
            m = int(kept.length[0, h])
            k, last, noise = kept.k[:, h : h + 1, :m], group[:, :, -m:], ask.noises(h * group.shape[1])
            votes[:, h : h + 1, :m] = self.ctx.ops.mass(last, k, m - last.shape[2], None, ask.group, ask.stat, noise)
        return votes

    def freeze(self) -> None:
        """From now on every step has the same shapes: for a compiled or captured step. ValueError if no step here can be one."""
        if any(store.waits for store in self.stores.values()):
            raise ValueError(
                f"a step over {self.plan} waits for the host and cannot be compiled or captured; use --runner eager, or for "
                "shadow and quest --backend triton"
            )
        for store in self.stores.values():
            store.freeze()

    def report(self, seen: list[int]) -> Report:
        """The receipt. seen: tokens of text that this cache stands for, per row."""
        cfg, dtype = self.ctx.config, self.ctx.dtype
        lines, held, counted, hosted = [], 0, {}, {}
        for i in range(cfg.num_hidden_layers):
            owner = self.plan.owner(i)
            store, tail = self.stores[owner], [self.layers[i].tail.q] if self.layers[i].tail else []
            before = sum(counted.values())
            counted |= storages([*(store.tensors() if owner == i else []), *tail])
            hosted |= storages(store.hosted())
            k, v, rest = store.live()
            elements = int(store.length.sum()) * cfg.head_dim
            size = sum(counted.values()) - before
            lines.append(LayerReport(i, owner, size, store.length.tolist(), 8 * k / elements, 8 * v / elements))
            held += (k + v + rest if owner == i else 0) + sum(x.nbytes for x in tail)
        held += sum(x.nbytes for x in self.ctx.made.values())
        heads = cfg.num_hidden_layers * cfg.num_key_value_heads
        full = sum(seen) * heads * 2 * cfg.head_dim * dtype.itemsize
        return Report(sum(x.bytes for x in lines), held, sum(hosted.values()), full, seen, lines)


class Owner:
    """A layer with storage of its own, possibly read by later layers too."""

    owns = True

    def __init__(self, store: Store, plan: Plan, index: int, ctx: Context, tail: Tail | None):
        self.store, self.policy, self.tail, self.ctx = store, plan.keep, tail, ctx
        self.ops, self.dtype = ctx.ops, ctx.dtype
        self.of = self
        self.sliding_window = ctx.config.sliding_window
        self.alone = plan.last_reader(index) == index
        self.new: tuple[Tensor, Tensor] | None = None  # a turn's k, v, until the last reader has seen them
        self.heard: list[Tensor] = []  # votes of the readers so far in this step

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        k, v = k.to(self.dtype), v.to(self.dtype)
        if q.shape[2] == 1:
            self.store.append(k, v, pos)
        else:
            self.new = (k, v)
        return self.answer(q, pos, self.alone, self.tail)

    def answer(self, q: Tensor, pos: Tensor, last: bool, tail: Tail | None) -> Tensor:
        """What one reader's queries get. A turn may come in the prefill's type; the cache keeps its own."""
        state = q.to(self.dtype)
        if tail is not None:
            tail.hear(state, pos)
        sinks = self.store.slots.protected if self.policy.positions == "cache" else 0
        near = self._near(state, pos) if sinks else None
        out, lse, votes = self.store.read(state, pos, near)
        if q.shape[2] > 1:
            out, _ = merge([(out, lse), self.ops.turn(state, *self.new, 0, self.sliding_window)])
            if last:
                self.store.extend(*self.new, pos)
                self.new = None
        elif votes is not None:
            self.heard.append(votes)
            if last:
                votes = torch.stack(self.heard) if len(self.heard) > 1 else self.heard[0][None]
                self.store.slots.votes = self.policy.watch(self.store.slots, votes, pos)
                self.heard = []
        return out.to(q.dtype)

    def _near(self, q: Tensor, pos: Tensor) -> Tensor:
        """The queries turned back to their place in the cache: what lies between the sinks and the rest takes no room."""
        s, T = self.store.slots, q.shape[2]
        before = s.length[:, :1] - (1 if T == 1 else 0)  # a single token is stored already, a turn is not yet
        gap = before + torch.arange(T, device=pos.device) - pos
        gap = torch.where(s.sink[:, :1] < s.protected, 0, gap)  # where the model's own window has passed the sinks
        return rotate(q.transpose(1, 2), angles(self.ctx.inv_freq, gap)).transpose(1, 2)


class Reader:
    """A layer without storage: it asks another one's."""

    owns = False

    def __init__(self, of: Owner, last: bool, tail: Tail | None):
        self.of, self.last, self.tail = of, last, tail

    def attend(self, q: Tensor, k: None, v: None, pos: Tensor) -> Tensor:
        return self.of.answer(q, pos, self.last, self.tail)
