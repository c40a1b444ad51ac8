"""The prefill side of a cache: one prompt, dense and growing; each layer is compressed as soon as its last reader has attended.

It knows when a prompt is complete because it is told its length at the start; whole or in chunks is the same code. It knows
policies only through `keep`. Between layers, only `kept` of the finished ones and the runs still open are alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.plan import Plan
from nanokv.cache.protocol import Context
from nanokv.cache.scores import Ask, score_queries, moments
from nanokv.model.config import ModelConfig
from nanokv.model.rope import inverse_frequencies, unrotated
from nanokv.policies.base import Policy


class PromptCache:
    """`kept` (owner → survivors) is complete once `length` tokens went through. `wait` tokens beyond the prompt may be part of it."""

    def __init__(self, plan: Plan, config: ModelConfig, ids: Tensor, ops: Ops, ctx: Context | None = None):
        """ctx: of the cache that the survivors are for, so that its store may take them layer by layer."""
        self.plan, self.config, self.ops, self.ctx = plan, config, ops, ctx
        self.ids = ids  # (T,)
        self.length = len(ids) + plan.keep.wait
        self.asks = {plan.keep.ask}
        self.inv_freq = inverse_frequencies(config).to(ids.device)
        self.kept: dict[int, Kept] = {}
        self.runs: dict[int, Run] = {}
        self.layers = [PromptLayer(self, i) for i in range(config.num_hidden_layers)]

    def run_of(self, owner: int) -> Run:
        if owner not in self.runs:
            self.runs[owner] = Run(self.length)
        return self.runs[owner]

    def finish(self, owner: int) -> None:
        """Ask the policy what stays of this owner's run, and let go of the rest."""
        keep = self.plan.keep
        kept = keep.keep(self.runs.pop(owner).close(owner, self, keep.ask))
        alone = type(keep).settle is Policy.settle  # no later layer changes what this one keeps
        self.kept[owner] = self.plan.store.early(kept, self.ctx) if self.ctx and alone else kept
        self.kept = keep.settle(self.kept)


class PromptLayer:
    def __init__(self, cache: PromptCache, index: int):
        self.cache, self.index = cache, index
        self.owner = cache.plan.owner(index)
        self.owns = self.owner == index
        self.last = cache.plan.last_reader(self.owner) == index

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        cache, run = self.cache, self.cache.run_of(self.owner)
        if self.owns:
            run.extend(k, v)
        start = run.filled - q.shape[2]
        window = cache.config.sliding_window
        out = cache.ops.prefill(q, run.k[:, :, : run.filled], run.v[:, :, : run.filled], start, window)
        run.listen(self.index, q, pos, start, cache)
        if self.last and run.filled == run.length:
            cache.finish(self.owner)
        return out


class Run:
    """One owner's dense keys and values, and what its readers' queries say about them."""

    def __init__(self, length: int):
        self.length, self.filled = length, 0
        self.k: Tensor | None = None  # (1,Hkv,length,D); a whole prompt's own tensors, not a copy
        self.v: Tensor | None = None
        self.tail: dict[int, Tensor] = {}  # reader → its last queries so far (1,H,w,D)
        self.votes: dict[tuple[Ask, int], Tensor] = {}  # (ask, reader) → (1,Hkv,T)
        self.sums: dict[
            tuple[int, int], tuple[Tensor, Tensor, int]
        ] = {}  # (left out, reader) → Σq (1,H,D), Σqqᵀ, how many

    def extend(self, k: Tensor, v: Tensor) -> None:
        n = k.shape[2]
        if n == self.length:
            self.k, self.v = k, v
        else:
            if self.k is None:
                shape = (1, k.shape[1], self.length, k.shape[3])
                self.k, self.v = k.new_empty(shape), v.new_empty(shape)
            self.k[:, :, self.filled : self.filled + n] = k
            self.v[:, :, self.filled : self.filled + n] = v
        self.filled += n

    def listen(self, reader: int, q: Tensor, pos: Tensor, start: int, cache: PromptCache) -> None:
        """Let queries vote: all of them as they come, or the last w once the prompt is complete."""
        window = cache.config.sliding_window
        for ask in cache.asks:
            if ask.rows is None:
                votes = score_queries(ask, q, self.k[:, :, : self.filled], start, window, cache.ops)
                if (before := self.votes.get((ask, reader))) is not None:
                    old = votes[:, :, :start]
                    votes[:, :, :start] = old.maximum(before) if ask.stat == "hit" else old + before
                self.votes[ask, reader] = votes
        for skip in {ask.moments for ask in cache.asks} - {None}:
            self._sum(skip, reader, q, pos, start, cache.inv_freq)
        rows = max(ask.rows or 0 for ask in cache.asks)
        if rows == 0:
            return
        before = self.tail.get(reader)
        tail = q[:, :, -rows:] if before is None else torch.cat((before, q), 2)[:, :, -rows:]
        if self.filled < self.length:
            self.tail[reader] = tail.clone() if before is None else tail
            return
        for ask in cache.asks:
            if ask.rows:
                last = tail[:, :, -ask.rows :]
                self.votes[ask, reader] = score_queries(ask, last, self.k, self.length - last.shape[2], window, cache.ops)

    def _sum(self, skip: int, reader: int, q: Tensor, pos: Tensor, start: int, inv_freq: Tensor) -> None:
        """Add to the moments of the queries before rotation. A text no longer than what is left out counts as it is."""
        skip = skip if self.length > skip else 0
        raw = unrotated(q, pos, inv_freq)[:, :, max(0, skip - start) :]
        old = self.sums.get((skip, reader), (0, 0, 0))
        new = raw.sum(2), raw.transpose(-1, -2) @ raw, raw.shape[2]
        self.sums[skip, reader] = tuple(a + b for a, b in zip(old, new, strict=True))

    def close(self, layer: int, cache: PromptCache, ask: Ask) -> Prompt:
        """The run as a policy with this ask sees it: without what the model's sliding window will never show again."""
        window, plan = cache.config.sliding_window, cache.plan
        lo = 0 if window is None else max(0, self.length - window + 1)
        pos = torch.arange(lo, self.length, dtype=torch.int32, device=self.k.device).expand(1, self.k.shape[1], -1)
        votes = [x[:, :, lo:] for (asked, _), x in self.votes.items() if asked == ask]  # readers came in their order
        n_votes = self.length if ask.rows is None else min(ask.rows, self.length)
        mean = cov = None
        if ask.moments is not None:
            skip = ask.moments if self.length > ask.moments else 0
            mean, cov = moments([x for (left_out, _), x in self.sums.items() if left_out == skip])
        rank, owners = plan.rank(layer), cache.config.num_hidden_layers - len(plan.share)
        k, v, votes = self.k[:, :, lo:], self.v[:, :, lo:], torch.cat(votes) if votes else None
        place = layer, rank, owners, self.length, self.length - lo
        return Prompt(*place, k, v, pos, votes, n_votes, cache.ops, mean, cov, cache.inv_freq)
