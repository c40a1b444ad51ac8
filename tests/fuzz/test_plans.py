"""Whatever the plan: a row beside others equals the row alone, chunks equal the whole prompt, and neither a file nor late
room in between changes anything.

Plans that hold tokens exactly are compared in fp32. Where a store rounds or values are refitted, the last bit of a sum may decide, so
these plans are computed in fp64 throughout: then nothing can be excused as a tie.
"""

from __future__ import annotations

import contextlib
import random
import re
from dataclasses import replace

import pytest
import torch
from fuzz.plans import STEPS, Case, draw, talk, through_a_file
from helpers import first
from tiny import text

from nanokv import parse
from nanokv.llm import LLM

MODELS = "g3", "mistral", "deep"  # groups of three, a sliding window, eight layers
EXACT, ROUNDED = 1e-4, 1e-6  # largest difference of logits, in fp32 and in fp64


@contextlib.contextmanager
def everything_in_fp64(llm: LLM, monkeypatch):
    """Also what nanokv computes in fp32 whatever the model's type, such as attention."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        llm.models.prefill.double()
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            llm.models.prefill.to(torch.float32)


GROUPS = "int2:group=8,residual=8"
LAZY = "simlayer:threshold=0.45,sink=2,recent=16,window=4"
GROW = "full+quest:chunk=4,budget=16,local=1,grow=8"
FOUND = {  # faults that were found: the model, the plan, its shared layers, the lengths of the rows
    "the sinks of a row pinned tokens of all, int2": ("g3", f"{LAZY}+{GROUPS}", {}, [37, 52, 45]),
    "the sinks of a row pinned tokens of all, int8": ("g3", f"{LAZY}+int8:group=4,residual=0", {}, [37, 52, 45]),
    "the sinks of a row pinned tokens of all, int4": ("mistral", f"{LAZY}+int4:group=2,residual=3", {}, [20, 52, 45]),
    "the sinks of a row pinned tokens of all, light": (
        "deep",
        f"simlayer:variant=light,sink=2,recent=16,window=4,full=1+{GROUPS}",
        {},
        [12, 52, 45],
    ),
    "the sinks of a row pinned tokens of all, kvsharer": ("g3", f"{LAZY}+{GROUPS}", {2: 1}, [37, 52, 45]),
    "the sinks of a row kept tokens of all exact, fp8": ("g3", f"{LAZY}+fp8", {}, [37, 52, 45]),
    "a ring in a row made the pinned tokens of all rounded": ("g3", f"{LAZY}+turbo:pin=3", {}, [12, 52, 45]),
    "reserving began the count of grow again": ("g3", GROW, {}, [60, 41]),
    "a file did not hold the count of grow": (
        "deep",
        "full+shadow:chunk=4,budget=16,local=1,grow=8,outliers=1",
        {},
        [60, 52],
    ),
    "a turn met a store whose tokens all lie in chunks": ("g3", "full+quest:chunk=4,budget=8,local=0", {}, [60, 52]),
    "keys of equal norm were told apart by noise": ("g3", "knorm:budget=40%,every=3,heads=ada", {}, [45, 24]),
    "keys of equal norm were told apart by noise, in layers": (
        "deep",
        "knorm:budget=40%,layers=pyramid,every=3",
        {2: 1},
        [37, 24],
    ),
    "a plan that came from a file was fitted to the longer text": (
        "deep",
        "pyramidinfer:budget=70%,recent=8,context=1",
        {},
        [45, 60],
    ),
}


# the same faults in other stores
ALIKE = [fault for fault in FOUND if re.search(", (int4|int2|light|kvsharer|in layers)$", fault)]


@pytest.mark.parametrize("fault", first(3, [*(f for f in FOUND if f not in ALIKE), *ALIKE]))
def test_what_was_once_wrong(fault, llm_of, tmp_path, monkeypatch):
    model, plan, share, lengths = FOUND[fault]
    prompts, more = [text(n, 3 + 10 * n) for n in lengths], [text(STEPS, 4 + 10 * n) for n in lengths]
    pieces = [3, 1, 1, 1, 1, 7, 1, 1, 1, 3, 1, 1, 1, 1]
    for save_after in (2, 6):
        case = Case(model, replace(parse(plan), share=share), prompts, more, pieces, 9, save_after, 6)
        compare(case, llm_of(model), tmp_path, monkeypatch)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--cases") or 12))


def test_a_random_plan_gives_a_row_the_same_logits_whatever_happens_around_it(seed, llm_of, tmp_path, monkeypatch):
    case = draw(random.Random(seed), {name: llm_of(name) for name in MODELS})
    compare(case, llm_of(case.model), tmp_path, monkeypatch)


def compare(case: Case, llm: LLM, tmp_path, monkeypatch) -> None:
    """The rows of a case alone, and in every other way."""
    rows, rounds = list(range(len(case.prompts))), case.plan.store.state_type is not None
    rounds |= getattr(case.plan.policy, "refit", "none") != "none"  # its system of equations magnifies the last bits
    with everything_in_fp64(llm, monkeypatch) if rounds else contextlib.nullcontext():
        alone = [talk(llm, case, [b])[0] for b in rows]
        file = through_a_file(llm, case, tmp_path / "cache")
        ways = {
            "in a batch": talk(llm, case, rows),
            "in chunks": talk(llm, case, [0], chunk=case.chunk),
            "saved and loaded": talk(llm, case, [0], after=file),
            "with late room": talk(llm, case, [0], room=case.room),
            "all of it": talk(llm, case, rows, chunk=case.chunk, room=case.room),
        }
    for how, logits in ways.items():
        for b, of_row in enumerate(logits):
            off = (of_row - alone[b]).abs().max().item()
            assert off <= (ROUNDED if rounds else EXACT), f"row {b} {how} is off by {off:.1e}: {case}"
