"""What torch.compile costs and brings, plan by plan: graphs, seconds, and the time of a step.

Each plan and mode gets a fresh runner in an empty cache of compiled code (cold), then another one that finds that code
again (warm). A plan's first prompt length compiles with static shapes; a second length shows what is compiled anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch._dynamo.utils import counters, get_compilation_metrics
from torch._inductor.utils import fresh_cache

from evals.quality import servable, text_of
from evals.speed import ROUNDS, STEPS, alternate, stepper
from nanokv.cache.plan import Plan
from nanokv.compiled import Compiled, CompileOptions
from nanokv.engine import Session
from nanokv.llm import LLM
from nanokv.runner import Eager


def measure(llm: LLM, plans: dict[str, Plan], lengths: tuple[int, int], modes: Iterable[CompileOptions]) -> list[dict]:
    """One record per plan and mode. lengths: of the prompt that is timed, and of a second one."""
    good, refused = servable(llm, list(plans.values()), max(lengths), ROUNDS * STEPS + 1, 1)
    names = list(plans)
    records = [{"plan": names[i], "refused": reason} for i, reason in refused.items()]
    for i in good:
        for how in modes:
            try:
                records.append({"plan": names[i], "mode": how.mode, **one(llm, plans[names[i]], lengths, how)})
            except ValueError as e:  # its steps wait for the host
                records.append({"plan": names[i], "mode": how.mode, "refused": str(e)})
    return records


def one(llm: LLM, plan: Plan, lengths: tuple[int, int], how: CompileOptions) -> dict:
    """Graphs at both lengths, seconds cold and warm, and the seconds of a step in plain calls and compiled."""
    model = llm.models.decode
    with fresh_cache():
        torch._dynamo.reset()
        runner, known = Compiled(model, how), len(get_compilation_metrics())
        before = _graphs()
        first_step(llm, plan, lengths[0], runner)
        graphs = _graphs() - before
        first_step(llm, plan, lengths[1], runner)
        reasons = [
            m.recompile_reason for m in get_compilation_metrics()[known:] if getattr(m, "recompile_reason", None)
        ]
        found = {
            "graphs": graphs,
            "graphs_second_length": _graphs() - before - graphs,
            "dynamic": how.dynamic is True or any("size" in reason or "stride" in reason for reason in reasons),
            "recompiles": reasons,
            "cold_s": runner.compile_s,
        }
        torch._dynamo.reset()
        warm = Compiled(model, how)
        steps = [first_step(llm, plan, lengths[0], each) for each in (Eager(model), warm)]
        found["warm_s"] = warm.compile_s
        eager_s, compiled_s = alternate(steps, llm.device)
    return found | {"eager_ms": 1e3 * eager_s, "compiled_ms": 1e3 * compiled_s, "ratio": eager_s / compiled_s}


def first_step(llm: LLM, plan: Plan, length: int, runner: Eager | Compiled):
    """Prefill, take two steps, and return the function that takes the next ones."""
    session = Session(replace(llm.models, runner=runner), llm.ready(plan), ROUNDS * STEPS + 3)
    step = stepper(session, session.start([text_of(llm, 0, length)]))
    for _ in range(2):  # a policy that decides after the prompt does so in the first
        step()
    return step


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]
