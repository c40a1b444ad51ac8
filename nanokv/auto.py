"""Which plan serves a prompt best under a budget. Several are tried on the prompt itself.

The prompt's last tokens are held back. Each plan compresses what stands before them, is fed the tokens that were held
back, and is compared with the uncompressed cache by the KL divergence of the next-token distributions. One prefill serves
all plans of a trial, and the answer's own prefill comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanokv.cache.budget import in_bytes
from nanokv.cache.plan import Plan, parse
from nanokv.inspect.dense import begin
from nanokv.inspect.fidelity import losses
from nanokv.llm import LLM

HELD_BACK = 64  # tokens; of a short prompt a quarter
SHORTEST = 64  # tokens of a prompt; on a shorter one the plans differ too little
CANDIDATES = (  # policies that judge by the prompt's end, as this trial does, and whose statistics cost little
    "snapkv:window=8,kernel=13",
    "adakv:window=8,kernel=13",
    "critical:heads=ada",
    "defensive",
    "streaming",
)
# where the budget is a size, rounding leaves room for more tokens
ROUNDED = ("snapkv:window=8,kernel=13+int8", "snapkv:window=8,kernel=13+int4", "streaming+int4")


@dataclass(frozen=True)
class Trial:
    """What came of one plan. `kl` is the mean over the tokens held back, in nats; `same` is the share of them (0 … 1) where
    the most likely token is that of the uncompressed cache; `bytes` is what the plan's cache held then.
    """

    name: str
    plan: Plan
    kl: float
    same: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.name} {self.kl:.3f}"


def choose(llm: LLM, ids: Sequence[int], budget: str, room: int) -> list[Trial]:
    """Try the candidates under this budget on the prompt `ids` → what came of them, the best first.

    budget: as --kv-budget: tokens, percent or bytes. room: tokens that will follow the prompt. ValueError if the prompt
    is too short, or if no candidate can serve it.
    """
    if len(ids) < SHORTEST:
        raise ValueError(
            f"auto needs a prompt of {SHORTEST} tokens to tell plans apart, and it has {len(ids)}; name a plan"
        )
    held = min(HELD_BACK, len(ids) // 4)
    plans, reasons = {}, []
    for name in candidates(budget):
        try:
            plan = parse(name).with_budget(budget)
            for length, after in ((len(ids), room), (len(ids) - held, max(held, room))):  # the answer, and the trial
                plan.fit(llm.config, llm.models.new_context().dtype, length, after)
            plans[name] = plan
        except ValueError as e:
            reasons.append(str(e))
    if not plans:
        raise ValueError(f"auto: no plan can serve this prompt under a budget of {budget}: {reasons[0]}")
    return sorted(compare(llm, plans, ids, held, max(held, room)), key=lambda t: (t.kl, t.bytes))


def candidates(budget: str) -> tuple[str, ...]:
    """The names of the plans that are tried under this budget."""
    return CANDIDATES + (ROUNDED if in_bytes(int(budget) if budget.isdigit() else budget) else ())


@torch.inference_mode()
def compare(llm: LLM, plans: Mapping[str, Plan], ids: Sequence[int], held: int, room: int) -> list[Trial]:
    """Compress all but the last `held` tokens under each plan, and compare with the full cache on these → a trial each."""
    tail, reference, trials, names = torch.tensor([list(ids[-held:])], device=llm.device), None, [], list(plans)
    for i, start in begin(llm, [Plan(), *plans.values()], ids[:-held], room):
        session, _ = start()
        logits = session.feed(tail, every_logit=True)[0]
        if i == 0:  # the full cache comes first
            reference = logits
            continue
        kl, same, *_ = losses(reference, logits, ids[-held:])
        name, size = names[i - 1], session.report().bytes
        trials.append(Trial(name, plans[name], kl.mean().item(), same.double().mean().item(), size))
    return trials
