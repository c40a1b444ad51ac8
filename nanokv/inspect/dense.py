"""Apply many plans to one dense prefill. A policy's `keep` reads only a `Prompt`, so all plans can use the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache, wanted_by
from nanokv.engine import Session, prefill
from nanokv.llm import LLM

# returns a session whose prompt is compressed, and the prompt's last logits (1,vocab)
Begin = Callable[[], tuple[Session, Tensor]]


class DenseRun(PromptCache):
    """A prompt cache that asks every plan's policy what to keep. `rows` holds {layer: kept tokens} for each plan."""

    def __init__(self, plans: Sequence[Plan], ids: Tensor, ctx: Context):
        super().__init__(plans[0], ids, ctx)
        self.plans = plans
        self.wanted = wanted_by([plan.policy for plan in plans])
        self.wants_similarity = any(plan.policy.wants_similarity for plan in plans)
        self.n_refit_queries = max(plan.policy.refit_queries for plan in plans)
        self.rows: list[dict[int, Kept]] = [{} for _ in plans]
        self.prompts: list[list[Prompt]] = [[] for _ in plans]  # for policies that choose across layers

    def compress(self, owner: int) -> None:
        if self.passes_left:
            return
        dense, n_owners = self.dense.pop(owner), self.plan.n_owners(len(self.layers))
        for plan, row, prompts in zip(self.plans, self.rows, self.prompts, strict=True):
            prompt = dense.as_prompt(owner, self, plan.policy)
            if not plan.policy.cross_layer:
                row[owner] = plan.policy.keep(prompt)
                continue
            prompts.append(prompt)
            if len(prompts) == n_owners:
                prompts.sort(key=lambda p: p.layer)
                row |= zip((p.layer for p in prompts), plan.policy.keep_all(prompts), strict=True)
                prompts.clear()


@torch.inference_mode()
def begin(llm: LLM, plans: Sequence[Plan], ids: Sequence[int], room: int) -> Iterator[tuple[int, Begin]]:
    """Yield, per plan, its index and a function that starts a session with `room` tokens after the prompt `ids`.

    The function may be called many times. One prefill serves all plans that share the same layers; of those that need
    scoring passes, all that differ in nothing but their budget. A plan that decides after the first new token runs its
    own prefill in every call.
    """
    models = llm.models
    fitted = [plan.fit(llm.config, models.new_context().dtype, len(ids), room) for plan in plans]
    groups: dict[tuple, list[int]] = {}
    for i, plan in enumerate(fitted):
        key = (i,) if plan.policy.decide_after else _prefill_key(plan, len(ids))
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        if fitted[members[0]].policy.decide_after:
            yield members[0], lambda i=members[0]: _start_session(llm, plans[i], ids, room)
            continue
        tokens = torch.tensor(ids, device=llm.device)
        run = DenseRun([fitted[i] for i in members], tokens, models.new_context())
        logits = prefill(models.prefill, run)
        # the cache and its layers refer to each other: rows left in it would stay until garbage collection
        rows, run.rows = run.rows, []
        for i, row in zip(members, rows, strict=True):
            yield (
                i,
                lambda i=i, row=row, logits=logits, tokens=tokens: (
                    _restore_session(llm, fitted[i], row, tokens, room),
                    logits,
                ),
            )


def _prefill_key(plan: Plan, n: int) -> tuple:
    """Plans for which this is equal can share one prefill of n tokens, and the scoring passes after it."""
    policy, share = plan.policy, tuple(sorted(plan.share.items()))
    passes = policy.passes(n)
    if not passes and not policy.positions_by_chunk:
        return share
    # the prompt's own attention, or what is replayed, may depend on every option but the budget
    options = ((f.name, getattr(policy, f.name)) for f in fields(policy) if f.name != "budget")
    return share, type(policy), passes, *options


def _start_session(llm: LLM, plan: Plan, ids: Sequence[int], room: int) -> tuple[Session, Tensor]:
    session = Session(llm.models, plan, room)
    return session, session.start([ids])


def _restore_session(llm: LLM, plan: Plan, row: dict[int, Kept], tokens: Tensor, room: int) -> Session:
    session = Session(llm.models, plan, room)
    session.restore(plan, dict(row), len(tokens), tokens)
    return session
