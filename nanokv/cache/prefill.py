"""The cache during prefill. It holds one prompt uncompressed, and compresses each layer as soon as the last layer that
reads its keys and values has attended. Only scoring passes, a choice across layers, and `decide_after` make it wait longer.

The cache knows the prompt's length from the start, so it sees when the prompt is complete. The same code takes a prompt
whole or in chunks. Of a policy it uses `keep`, `keep_all`, `passes`, `shift` and the declarations in `policies/base.py`.
After `keep`, the dense keys and values of a layer are freed and only its entry in `kept` remains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from nanokv.backends.base import merge
from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, Prompt, n_still_visible
from nanokv.cache.plan import Plan
from nanokv.cache.report import ScoringPasses
from nanokv.cache.scores import QuerySums, ScoreRequest, block_scores, moments, query_sums
from nanokv.model.rope import rotate_more, unrotated
from nanokv.policies.base import Policy

QUERIES_AT_ONCE = 256  # whose logits for one chunk of keys exist at once


class PromptCache:
    """`kept` maps each layer that owns storage to what it keeps. It is complete after `length` tokens and the
    policy's scoring passes.
    """

    def __init__(self, plan: Plan, ids: Tensor, ctx: Context):
        """ids (T,): the prompt's tokens. ctx: the `Context` of the `KVCache` that this prompt will go into. Each
        finished layer is prepacked for its store.
        """
        self.n_passes = self.passes_left = plan.policy.passes(len(ids))
        policy = plan.policy
        if self.n_passes and (policy.decide_after or policy.second_request or policy.positions_by_chunk):
            raise ValueError(
                f"{plan.names[0]} asks for scoring passes, so it may have no decide_after, second_request or positions_by_chunk"
            )
        self.plan, self.config, self.ops, self.ctx = plan, ctx.config, ctx.ops, ctx
        self.ids = ids
        self.length = len(ids) + plan.policy.decide_after  # tokens after the prompt may belong to it
        self.wanted = wanted_by([plan.policy])
        self.wants_similarity = plan.policy.wants_similarity
        self.n_refit_queries = plan.policy.refit_queries
        self.kept: dict[int, Kept] = {}
        self.dense: dict[int, DenseLayer] = {}  # layers whose keys and values are still whole
        self.n_given = 0  # tokens that need not be fed
        self.holds_all = bool(self.n_passes) or plan.policy.cross_layer  # whether all layers wait for the last one
        self.passes_cost: ScoringPasses | None = None  # known after the scoring passes
        self.layers = [PromptLayer(self, i) for i in range(ctx.config.num_hidden_layers)]

    def begin_with(self, row: Mapping[int, Kept], n: int) -> None:
        """Take the first n tokens over from a row that kept them all (layer → Kept), instead of computing them."""
        for owner, kept in row.items():
            self.dense_layer(owner).extend(kept.k[:, :, :n], kept.v[:, :, :n])
        self.n_given = n

    @property
    def dense_bytes(self) -> int:
        """Bytes of the keys and values that are still whole."""
        return sum(x.nbytes for layer in self.dense.values() for x in layer.keys_and_values())

    def dense_layer(self, owner: int) -> DenseLayer:
        if owner not in self.dense:
            self.dense[owner] = DenseLayer(self.length, self.wanted, self.holds_all)
        return self.dense[owner]

    def begin_pass(self, n: int, scored: Sequence[tuple[int, int]] | None = None) -> None:
        """The next n tokens are queries of a scoring pass: they see the whole prompt, score the keys of the runs `scored`
        (None: all), and their own keys are dropped afterwards.
        """
        self.passes_left -= 1
        for layer in self.dense.values():
            layer.begin_pass(n, scored)

    def run_block(self, block: Callable, x: Tensor, pos: Tensor, angle: Any, layer: PromptLayer) -> Tensor:
        """Run one block of the model on x (1,T,C), the residual stream, which its layer may compare with what comes of
        it.
        """
        layer.residual = x
        return block(x, pos, angle, layer)

    def compress(self, owner: int) -> None:
        """Compress what can be compressed now that all readers of `owner` have attended to the prompt or a scoring pass."""
        policy = self.plan.policy
        if self.passes_left:
            return
        if not policy.cross_layer:
            self._keep(owner, policy.keep(self._take_prompt(owner)))
        elif owner == self.plan.owner(len(self.layers) - 1):  # the model's last layer has attended, so all are complete
            owners = sorted(self.dense)
            prompts = [self._take_prompt(i) for i in owners]
            for i, kept in zip(owners, policy.keep_all(prompts), strict=True):
                self._keep(i, kept)

    def _take_prompt(self, owner: int) -> Prompt:
        return self.dense.pop(owner).as_prompt(owner, self, self.plan.policy)

    def _keep(self, owner: int, kept: Kept) -> None:
        store = self.plan.store.at(owner, len(self.layers))
        self.kept[owner] = store.prepack(kept, self.ctx.of_layer(owner))


class PromptLayer:
    """One layer's `attend` during prefill."""

    def __init__(self, cache: PromptCache, index: int):
        self.cache, self.index = cache, index
        self.owner = cache.plan.owner(index)
        self.owns = self.owner == index
        self.is_last_reader = cache.plan.last_reader(self.owner) == index
        self.residual: Tensor | None = None  # (1,T,C) the residual stream before this layer's attention
        self.similarity_sum: Tensor | float = 0.0  # over tokens
        self.compared = 0  # how many tokens

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        cache, dense = self.cache, self.cache.dense_layer(self.owner)
        if self.owns:
            dense.extend(k, v)
        keys, values = dense.keys_and_values()
        start = keys.shape[2] - q.shape[2]
        if dense.pass_length is None:
            out = self._attend_in_prompt(q, keys, values, start, pos)
        else:
            out = self._attend_in_pass(q, keys, values, start)
        if self.is_last_reader and dense.complete:
            dense.end_pass()
            cache.compress(self.owner)
        return out

    def _attend_in_prompt(self, q: Tensor, keys: Tensor, values: Tensor, start: int, pos: Tensor) -> Tensor:
        """Attention of the prompt's next tokens. Their queries are added to the statistics."""
        cache, dense = self.cache, self.cache.dense_layer(self.owner)
        if cache.plan.policy.positions_by_chunk:
            out = attend_by_chunk(q, keys, values, start, cache)
        else:
            out = cache.ops.prefill(q, keys, values, start, cache.config.window(self.index))
        for statistics in dense.statistics.values():
            statistics.add(self.index, q, pos, keys, dense, cache)
        if cache.n_refit_queries:
            dense.add_refit_queries(self.index, q, cache.n_refit_queries)
        if self.residual is not None:
            self._compare(out)
        return out

    def _attend_in_pass(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """Attention of a scoring pass's next tokens. Their queries score the prompt's keys."""
        cache, dense = self.cache, self.cache.dense_layer(self.owner)
        given = q, keys, values, start, cache.config.window(self.index), dense.length, dense.scored
        (statistics,) = dense.statistics.values()
        out, scores = cache.ops.prefill_scored(*given, *statistics.how_joined(cache))
        statistics.add_pass(self.index, scores, q.shape[2])
        return out

    def _compare(self, out: Tensor) -> None:
        """Add the similarities that the attention's output (1,H,T,D) gives the tokens of the residual stream."""
        w_o, x = self.cache.ctx.output_weights[self.index], self.residual
        after = x + linear(out.transpose(1, 2).flatten(2).to(w_o.dtype), w_o)
        self.similarity_sum += cosine_similarity(x.float(), after.float(), dim=-1).sum()
        self.compared += x.shape[1]
        self.residual = None


def attend_by_chunk(q: Tensor, k: Tensor, v: Tensor, start: int, cache: PromptCache) -> Tensor:
    """Attention of the tokens start … start+T−1, whose queries q (1,H,T,D) are rotated anew for each earlier chunk of the
    keys and values of tokens 0 … start+T−1.
    """
    ops, policy, size, end = cache.ops, cache.plan.policy, cache.plan.policy.chunk_size, start + q.shape[2]
    if end <= size:
        return ops.prefill(q, k, v, start, None)
    key_pos, found = torch.arange(size, device=q.device).expand(1, k.shape[1], size), []
    a = start
    while a < end:
        own = a - a % size  # where the queries' chunk begins
        b = min(end, own + size, a + QUERIES_AT_ONCE)
        queries, pos = q[:, :, a - start : b - start], torch.arange(a, b, device=q.device)[None]
        parts = [ops.turn(queries, k[:, :, own:b], v[:, :, own:b], a - own, None)]
        for first in range(0, own, size):
            rotated = rotate_more(queries, policy.shift(pos, first), cache.ctx.inv_freq)
            chunk = (x[:, :, first : first + size] for x in (k, v))
            parts.append(ops.decode(rotated, *chunk, None, key_pos, pos, None)[:2])
        found.append(merge(parts)[0])
        a = b
    return torch.cat(found, 2)


class DenseLayer:
    """The keys and values of one layer that owns storage, and the statistics of its readers' queries."""

    def __init__(self, length: int, wanted: Sequence[ScoreRequest], is_held: bool):
        """is_held: this layer waits for others, so it copies its keys and values: as views they would keep alive all that
        the layer projected.
        """
        self.length, self.filled, self.is_held = length, 0, is_held
        # (1,Hkv,length,D); a view if the prompt came in one piece and the layer is not held
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.statistics = {request: Statistics(request) for request in wanted}
        # reader → its last queries so far (1,H,w,D), for policies that see them
        self.refit_queries: dict[int, Tensor] = {}
        self.pass_length: int | None = None  # tokens of the scoring pass in progress
        self.pass_kv: tuple[Tensor, Tensor] | None = None  # its keys and values so far
        self.scored: Sequence[tuple[int, int]] | None = None  # the runs of keys that it scores; None: all

    def begin_pass(self, n: int, scored: Sequence[tuple[int, int]] | None) -> None:
        self.pass_length, self.pass_kv, self.scored = n, None, scored

    def end_pass(self) -> None:
        self.pass_length, self.pass_kv, self.scored = None, None, None

    def add_refit_queries(self, reader: int, q: Tensor, n: int) -> None:
        before = self.refit_queries.get(reader)
        self.refit_queries[reader] = (q if before is None else _cat(before, q))[:, :, -n:].clone()

    def extend(self, k: Tensor, v: Tensor) -> None:
        n = k.shape[2]
        if self.pass_length is not None:
            self.pass_kv = (k, v) if self.pass_kv is None else (_cat(self.pass_kv[0], k), _cat(self.pass_kv[1], v))
            return
        if n == self.length and not self.is_held:
            self.k, self.v = k, v
        else:
            if self.k is None:
                shape = (1, k.shape[1], self.length, k.shape[3])
                self.k, self.v = k.new_empty(shape), v.new_empty(shape)
            self.k[:, :, self.filled : self.filled + n] = k
            self.v[:, :, self.filled : self.filled + n] = v
        self.filled += n

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The keys and values so far: the prompt's and, in a scoring pass, that pass's own."""
        k, v = self.k[:, :, : self.filled], self.v[:, :, : self.filled]
        return (k, v) if self.pass_kv is None else (_cat(k, self.pass_kv[0]), _cat(v, self.pass_kv[1]))

    @property
    def complete(self) -> bool:
        if self.pass_length is not None:
            return self.pass_kv[0].shape[2] == self.pass_length
        return self.filled == self.length

    def as_prompt(self, layer: int, cache: PromptCache, policy: Policy) -> Prompt:
        """This layer as the policy sees it, without the tokens that the model's sliding window will never show again."""
        wanted = policy.request
        sliding_window, plan, found = cache.config.window(layer), cache.plan, self.statistics[wanted]
        first = 0 if sliding_window is None else max(0, self.length - n_still_visible(sliding_window))
        pos = torch.arange(first, self.length, dtype=torch.int32, device=self.k.device).expand(1, self.k.shape[1], -1)
        scores = [x[:, :, first:] for x in found.scores.values()]  # in the order of the layers
        if found.keeps_query_heads(cache):
            scores = [x.unflatten(1, (self.k.shape[1], -1)).amax(2) for x in scores]
        n_queries = self.length if wanted.last_queries is None else min(wanted.last_queries, self.length)
        mean, cov, lengths = moments(list(found.sums.values())) if found.sums else (None, None, None)
        mine, kinds, second = cache.layers[layer], None, None
        if policy.wants_token_kinds and cache.ctx.token_kinds:
            kinds = cache.ctx.token_kinds()[cache.ids]
        if policy.second_request:
            second = torch.cat([x[:, :, first:] for x in self.statistics[policy.second_request].scores.values()])
        return Prompt(
            layer=layer,
            rank=plan.rank(layer),
            owners=plan.n_owners(cache.config.num_hidden_layers),
            seen=self.length,
            n_visible=self.length - first,
            k=self.k[:, :, first:],
            v=self.v[:, :, first:],
            pos=pos,
            attention=torch.cat(scores) if scores else None,
            n_queries=found.pass_queries or n_queries,
            ops=cache.ops,
            q_mean=mean,
            q_cov=cov,
            q_abs=lengths,
            inv_freq=cache.ctx.inv_freq,
            w_o=cache.ctx.output_weights[layer] if wanted.output_weights else None,
            similarity=float(mine.similarity_sum) / mine.compared if mine.compared else None,
            tokens=cache.ids,
            token_kinds=kinds,
            second_attention=second,
            queries=torch.cat([q[:, :, -policy.refit_queries :] for q in self.refit_queries.values()])
            if policy.refit_queries
            else None,
        )


def wanted_by(policies: Sequence[Policy]) -> list[ScoreRequest]:
    """The statistics that these policies want, each once."""
    both = [request for policy in policies for request in (policy.request, policy.second_request) if request]
    return list(dict.fromkeys(both))


class Statistics:
    """Collects what one `ScoreRequest` asks of the queries that read a layer."""

    def __init__(self, wanted: ScoreRequest):
        self.wanted = wanted
        self.scores: dict[int, Tensor] = {}  # reader → scores (1,Hkv,N); (1,H,N) if `keeps_query_heads`
        self.waiting_queries: dict[int, Tensor] = {}  # reader → queries (1,H,w,D) that score later
        self.sums: dict[int, QuerySums] = {}  # reader → sums over its queries
        self.pass_queries = 0  # queries of scoring passes, per reader

    def add(self, reader: int, q: Tensor, pos: Tensor, keys: Tensor, dense: DenseLayer, cache: PromptCache) -> None:
        """Add a reader's next queries q (1,H,T,D) at pos (1,T). keys (1,Hkv,N,D): all keys so far, the last T of them these tokens' own."""
        wanted = self.wanted
        if wanted.query_moments is not None:
            self._add_moments(reader, q, pos, keys.shape[2] - q.shape[2], dense.length, cache.ctx.inv_freq)
        if wanted.block is not None:
            self._add_blocks(reader, q, keys, dense.length)
        elif cache.n_passes or wanted.last_queries == 0:
            return  # only the queries of scoring passes score the keys, or none
        elif wanted.last_queries is None:
            self._add_all(reader, q, keys, cache)
        else:
            self._add_window(reader, q, keys, dense, cache)

    def _add_window(self, reader: int, q: Tensor, keys: Tensor, dense: DenseLayer, cache: PromptCache) -> None:
        """Score the keys by the observation window once the prompt is complete. Until then, hold its queries."""
        before, n = self.waiting_queries.get(reader), self.wanted.last_queries
        last = q[:, :, -n:] if before is None else _cat(before, q)[:, :, -n:]
        if dense.complete:
            start, sliding_window = dense.length - last.shape[2], cache.config.window(reader)
            self.scores[reader] = self._score(reader, last, keys, start, cache, sliding_window)
        else:
            self.waiting_queries[reader] = last.clone()  # a view would keep the whole chunk's queries alive

    def _add_all(self, reader: int, q: Tensor, keys: Tensor, cache: PromptCache) -> None:
        """Score the keys by all queries, as they come."""
        start = keys.shape[2] - q.shape[2]
        self._join(reader, self._score(reader, q, keys, start, cache, cache.config.window(reader)))

    def add_pass(self, reader: int, scores: Tensor, n: int) -> None:
        """Add the scores that n queries of a scoring pass gave the prompt's keys; shapes as in `_score`."""
        # every reader has the same queries, so only the first reader counts them
        self.pass_queries += n if reader == min(self.scores, default=reader) else 0
        self._join(reader, scores)

    def _score(
        self, reader: int, q: Tensor, k: Tensor, start: int, cache: PromptCache, sliding_window: int | None
    ) -> Tensor:
        """Scores of the keys by these queries, joined as `wanted` says: (1,Hkv,N), or (1,H,N) if `keeps_query_heads`.
        kernels/reference.py, `attention_scores`, has the formula.
        """
        return cache.ops.attention_scores(q, k, start, sliding_window, *self.how_joined(cache))

    def how_joined(self, cache: PromptCache) -> tuple[str, str, tuple[int, float, int] | None, int | None]:
        """How `attention_scores` joins attention into scores: its last four arguments."""
        wanted = self.wanted
        over_group = "each" if self.keeps_query_heads(cache) else wanted.over_group
        return over_group, wanted.over_queries, wanted.noise(0), wanted.near

    def keeps_query_heads(self, cache: PromptCache) -> bool:
        """Whether the scores of each query head are kept until the prompt is complete: a maximum over heads of sums over
        all queries cannot be taken chunk by chunk.
        """
        in_pieces = cache.n_passes > 0 or self.wanted.last_queries is None
        return in_pieces and self.wanted.over_group == "max" and self.wanted.over_queries == "sum"

    def _join(self, reader: int, new: Tensor) -> None:
        old = self.scores.get(reader)
        if old is not None:
            n = old.shape[2]
            new[:, :, :n] = self.wanted.join(old, new[:, :, :n])
        self.scores[reader] = new

    def _add_blocks(self, reader: int, q: Tensor, keys: Tensor, length: int) -> None:
        """Score the keys of each block whose queries are all there, of a text of `length` tokens, and hold the others."""
        size, (first, last) = self.wanted.block, self.wanted.block_edges
        if reader not in self.scores:
            self.scores[reader] = torch.zeros(1, keys.shape[1], length, device=q.device)
        elif reader in self.waiting_queries:
            q = _cat(self.waiting_queries.pop(reader), q)
        now, end = keys.shape[2], length - last
        held_from = now - q.shape[2]
        a = max(first, held_from)
        while a < end and min(a + size, end) <= now:
            b = min(a + size, end)
            mine = q[:, :, a - held_from : b - held_from]
            self.scores[reader][:, :, a:b] = block_scores(mine, keys[:, :, a:b])
            a = b
        if a < min(now, end):
            self.waiting_queries[reader] = q[:, :, a - held_from :].clone()

    def _add_moments(self, reader: int, q: Tensor, pos: Tensor, start: int, length: int, inv_freq: Tensor) -> None:
        """Add to the moments of the queries before rotation. If the text is too short to skip any, all count."""
        skip = self.wanted.query_moments if length > self.wanted.query_moments else 0
        raw = unrotated(q, pos, inv_freq)[:, :, max(0, skip - start) :]
        old = self.sums.get(reader, (0, 0, 0, 0))
        self.sums[reader] = tuple(a + b for a, b in zip(old, query_sums(raw), strict=True))


def _cat(a: Tensor, b: Tensor) -> Tensor:
    """Along the tokens."""
    return torch.cat((a, b), 2)
