"""One dense prefill, many plans: `keep` reads nothing but a `Prompt`, so every plan may be applied to the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache
from nanokv.engine import Session, prefill
from nanokv.llm import LLM
from nanokv.model.config import ModelConfig

# makes a session at the end of its prompt, with the prompt's last logits (1,vocab)
Begin = Callable[[], tuple[Session, Tensor]]


class DenseRun(PromptCache):
    """A prompt's cache that asks every plan's policy what it would keep: `rows`, one dict of survivors per plan."""

    def __init__(self, plans: Sequence[Plan], config: ModelConfig, ids: Tensor, ops: Ops):
        super().__init__(plans[0], config, ids, ops)
        self.plans = plans
        self.asks = {plan.keep.ask for plan in plans}
        self.rows: list[dict[int, Kept]] = [{} for _ in plans]

    def finish(self, owner: int) -> None:
        run = self.runs.pop(owner)
        for i, plan in enumerate(self.plans):
            self.rows[i][owner] = plan.keep.keep(run.close(owner, self, plan.keep.ask))
            self.rows[i] = plan.keep.settle(self.rows[i])


@torch.inference_mode()
def begin(llm: LLM, plans: Sequence[Plan], ids: Sequence[int], room: int) -> Iterator[tuple[int, Begin]]:
    """Per plan its index and a function that makes a session with `room` after the prompt ids, as often as it is called.

    One prefill serves all plans with the same layers sharing; those that wait for the first new token have one for each session.
    """
    models = llm.models
    fitted = [plan.fit(llm.config, models.context.dtype, len(ids), room) for plan in plans]
    groups: dict[tuple, list[int]] = {}
    for i, plan in enumerate(fitted):
        groups.setdefault((i,) if plan.keep.wait else tuple(sorted(plan.share.items())), []).append(i)
    for members in groups.values():
        if fitted[members[0]].keep.wait:
            yield members[0], lambda i=members[0]: _fresh(llm, plans[i], ids, room)
            continue
        run = DenseRun([fitted[i] for i in members], llm.config, torch.tensor(ids, device=llm.device), models.ops)
        logits = prefill(models.prefill, run)
        # a cache and its layers hold each other: what it goes on holding would wait for the collector
        rows, run.rows = run.rows, []
        for i, row in zip(members, rows, strict=True):
            yield i, lambda i=i, row=row, logits=logits: (_resume(llm, fitted[i], row, len(ids), room), logits)


def _fresh(llm: LLM, plan: Plan, ids: Sequence[int], room: int) -> tuple[Session, Tensor]:
    session = Session(llm.models, plan, room)
    return session, session.start([ids])


def _resume(llm: LLM, plan: Plan, row: dict[int, Kept], seen: int, room: int) -> Session:
    session = Session(llm.models, plan, room)
    session.restore(plan, dict(row), seen)
    return session
