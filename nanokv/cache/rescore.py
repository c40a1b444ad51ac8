"""Rescoring: asking a policy again about what a cache holds, every so many tokens while decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, Prompt, n_still_visible
from nanokv.cache.plan import Plan
from nanokv.cache.scores import ScoreRequest, moments, query_sums
from nanokv.model.rope import unrotated


class QueryBuffer:
    """The last `size` queries of one reading layer, for policies that score the held keys with them at a rescore; size 0:
    they want none.
    """

    def __init__(self, size: int, rows: int, ctx: Context):
        self.size = size
        self.q = ctx.empty(rows, ctx.config.num_attention_heads, size, ctx.config.head_dim).zero_()

    def push(self, q: Tensor, pos: Tensor) -> None:
        """q (B,H,T,D) at pos (B,T). All rows advance together, so row 0's positions pick the places."""
        if self.size:
            self.q.index_copy_(2, pos[0, -self.size :] % self.size, q[:, :, -self.size :])

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i hold what row rows[i] holds."""
        self.q.copy_(self.q[list(rows)])

    def ordered(self, row: int, seen: Sequence[int]) -> Tensor:
        """(1,H,size,D): one row's queries, the oldest first."""
        return self.q[row : row + 1].roll(-(seen[0] % self.size), 2)


def stored_as_prompt(
    kept: Kept,
    layer: int,
    row: int,
    seen: Sequence[int],
    buffers: Sequence[QueryBuffer],
    plan: Plan,
    ctx: Context,
    tokens: Tensor | None,
) -> Prompt:
    """What one row holds in one layer, as the policy sees it. buffers: of all layers that read this one."""
    config, wanted, n = ctx.config, plan.policy.rescore_request, seen[row]
    window = config.window(layer)
    kept = kept.in_window(n, window)
    found = Prompt(
        layer=layer,
        rank=plan.rank(layer),
        owners=plan.n_owners(config.num_hidden_layers),
        seen=n,
        n_visible=min(n, n_still_visible(window)) if window else n,
        k=kept.k,
        v=kept.v,
        pos=kept.pos,
        attention=kept.running_scores,
        n_queries=0,
        ops=ctx.ops,
        inv_freq=ctx.inv_freq,
        state=kept.state,
        w_o=ctx.output_weights[layer] if wanted.output_weights else None,
        tokens=tokens,
    )
    if not buffers or not wanted.buffered_queries:
        return found
    queries = [buffer.ordered(row, seen) for buffer in buffers]
    if wanted.last_queries:
        found.attention = torch.cat([_scores_of(q, kept, wanted, ctx) for q in queries])
        found.n_queries = wanted.last_queries
    if wanted.query_moments is not None:
        pos = torch.arange(n - wanted.buffered_queries, n, device=ctx.device)[None]
        raw = [unrotated(q, pos, ctx.inv_freq) for q in queries]
        found.q_mean, found.q_cov, found.q_abs = moments([query_sums(q) for q in raw])
    return found


def _scores_of(q: Tensor, kept: Kept, wanted: ScoreRequest, ctx: Context) -> Tensor:
    """Scores (1,Hkv,N) of kept keys by the last w queries (1,H,w,D). The last w tokens that each head holds are the
    queries' own.
    """
    _, heads, n, _ = kept.k.shape
    scores = torch.zeros(1, heads, n, device=q.device)
    for h, group in enumerate(q.chunk(heads, 1)):
        m = int(kept.length[0, h])
        k, last, noise = kept.k[:, h : h + 1, :m], group[:, :, -m:], wanted.noise(h * group.shape[1])
        start = m - last.shape[2]
        scores[:, h : h + 1, :m] = ctx.ops.attention_scores(
            last, k, start, None, wanted.over_group, wanted.over_queries, noise
        )
    return scores
