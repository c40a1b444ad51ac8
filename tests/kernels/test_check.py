"""The check of the kernels on a device that nobody has tried. A CPU with Triton's interpreter stands in for the device."""

from __future__ import annotations

import functools
import json
import os

import pytest
import torch
from helpers import PLANS, every
from test_launches import CONFIG, META, runs_on_kernels

import kernels
from evals import launches
from kernels import reference, selftest
from nanokv import load, parse
from nanokv.backends import check
from nanokv.backends.check import ALWAYS, PROGRAM, verdicts
from nanokv.backends.choose import choose
from nanokv.backends.torch_cpu import SDPA
from nanokv.backends.triton import triton_ops
from nanokv.device import choose_device
from nanokv.runner import Eager, Graphed, make

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, SHAPE = torch.float16, (3, 64)


def ask(folder, names, program: str = PROGRAM, limit_s: float = 60.0, shape: tuple = SHAPE) -> dict[str, str]:
    return verdicts(CPU, HALF, shape, names, folder, limit_s, program)


@pytest.mark.parametrize("name", every(3, kernels.__all__))
def test_every_kernel_passes_here(name):
    assert selftest.compare(name, CPU, HALF, *SHAPE) == ""


def test_every_kernel_has_a_case():
    assert set(selftest.CASES) == set(kernels.__all__)
    assert selftest.CASES["quantize"](selftest.Inputs(HALF, 1, 96)) == []  # the backend does not use it there


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("swiglu", lambda x: x[..., ::2] * 0 + 1),
        ("decode", lambda q, *_: (q * 0, q[..., 0].float(), q.new_zeros(2, 2, 200).float())),
        ("linear", lambda x, weight, bias: x.new_full((1, 1, 70), torch.nan)),
        ("append", lambda k, v, row, keys, values: None),
        ("take_slots", lambda cursor, *_: torch.zeros(4, dtype=torch.int64)),
        ("quantize", lambda x, *_: tuple(y * 0 for y in reference.quantize(x, *_))),
        ("decode", lambda q, k, v, n, *more: reference.decode(q, k, v, n - 1 if n.dim() == 2 else n, *more)),
        ("attention_scores", lambda *given: reference.attention_scores(*given) / 2),
    ],
)
def test_a_wrong_kernel_is_told(name, wrong, monkeypatch):
    monkeypatch.setattr(kernels, name, wrong)
    assert selftest.compare(name, CPU, HALF, *SHAPE) != ""


def test_a_kernel_that_raises_does_not_hide_the_others(monkeypatch, capsys):
    def raises(x):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(kernels, "swiglu", raises)
    selftest.main("cpu", "float16", "3", "64", ["swiglu", "take_slots"])
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"kernel": "swiglu", "why": "fails with RuntimeError: no such instruction"}
    assert lines[1] == {"kernel": "take_slots", "why": ""}


def test_a_process_of_its_own_gives_verdicts_that_are_kept(tmp_path):
    assert ask(tmp_path, ["swiglu", "take_slots"]) == {"swiglu": "", "take_slots": ""}
    assert ask(tmp_path, ["take_slots"], "raise SystemExit(1)") == {"take_slots": ""}  # nothing runs
    other = ask(tmp_path, ["take_slots"], "import sys; sys.exit('no driver')", shape=(1, 64))
    assert other == {"take_slots": "ended its process with status 1: no driver"}  # of another shape nothing is known


SAYS = (
    "import json, os, sys, time; say = lambda name, why: print(json.dumps({'kernel': name, 'why': why}), flush=True); "
)


def test_a_kernel_that_hangs_or_kills_its_process_is_told_and_the_next_are_tried_later(tmp_path):
    names = ["decode", "linear", "rotate"]
    found = ask(tmp_path, names, SAYS + "say('decode', ''); print('ptxas info'); time.sleep(60)", limit_s=3)
    assert found["decode"] == "" and found["linear"] == "gave no answer within 3 s"
    assert found["rotate"] == "was not tried, because linear gave no answer within 3 s"
    found = ask(tmp_path, names, SAYS + "say('rotate', '')")  # only rotate is asked again
    assert (found["linear"], found["rotate"]) == ("gave no answer within 3 s", "")
    found = ask(tmp_path / "other", names, SAYS + "say('decode', ''); os.kill(os.getpid(), 11)")
    assert found["linear"] == "ended its process with status -11"


def test_only_what_lies_in_the_kernel_is_remembered(tmp_path):
    names = ["decode", "linear", "rotate", "swiglu"]
    found = ask(tmp_path, names, SAYS + "say('decode', 'is off by 1'); say('linear', 'fails with OutOfMemoryError: x')")
    assert found["linear"].startswith("fails with Out") and found["rotate"] == "ended its process with status 0"
    found = ask(tmp_path, names, SAYS + "[say(name, '') for name in sys.argv[6:]]")
    assert found == {"decode": "is off by 1", "linear": "", "rotate": "", "swiglu": ""}


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}', '{"x": {"decode": 7}}'])
def test_a_damaged_file_of_verdicts_is_written_anew(content, tmp_path):
    (tmp_path / check.FILE).write_text(content)
    assert ask(tmp_path, ["decode"], SAYS + "say('decode', '')") == {"decode": ""}
    assert ask(tmp_path, ["decode"], "raise SystemExit(1)") == {"decode": ""}


def test_where_nothing_can_be_written_the_verdicts_still_come(tmp_path):
    assert ask(tmp_path / "none", ["decode"], SAYS + "say('decode', '')") == {"decode": ""}
    assert not os.listdir(tmp_path)


# ---- the choice ----


def test_what_a_cuda_device_gets_and_what_it_says():
    def passes(names):
        return dict.fromkeys(names, "")

    def fails(names):
        return dict.fromkeys(names, "") | {"decode": "is off by 0.3 where 0.02 is allowed", "linear": "hangs"}

    ops = choose("auto", CUDA, torch.bfloat16, ALWAYS, passes)
    assert (ops.name, ops.has_kernels, ops.why) == ("triton", True, "kernels checked")
    ops = choose("auto", CUDA, torch.bfloat16, ALWAYS, fails)
    assert (ops.name, ops.has_kernels) == ("sdpa", False)
    assert ops.why == "kernel decode is off by 0.3 where 0.02 is allowed, and 1 more"
    assert choose("auto", CUDA, torch.float32, ALWAYS, fails).why == "the kernels compute in 16 bits"
    assert choose("sdpa", CUDA, torch.bfloat16, ALWAYS, fails).decode.__module__ == "nanokv.backends.torch_cuda"
    assert choose("auto", CPU, torch.bfloat16, ALWAYS, fails) is SDPA


@pytest.mark.parametrize(("asked", "gets"), [("auto", 2), ("cuda", 2), ("cuda:1", 1)])
def test_a_cuda_device_is_made_the_current_one_and_has_a_number(asked, gets, monkeypatch):
    """As torch.cuda.set_device demands."""
    chosen = []

    def set_device(device):
        assert device.index is not None
        chosen.append(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr("nanokv.device.torch.empty", lambda *_, **__: None)
    assert choose_device(asked) == torch.device("cuda", gets) and chosen == [torch.device("cuda", gets)]


@pytest.mark.parametrize(
    "plan",
    [
        *every(4, [plan for plan in PLANS if runs_on_kernels(plan)]),
        "full+int4:group=32",
        "full+shadow:chunk=4,budget=16",
        "full+quest",
        "full+kcache",
    ],
)
def test_a_plan_names_every_kernel_that_it_runs(plan, monkeypatch):
    """The prompt is compressed on the CPU here, so what runs then is not seen: compact, quantize, attention_scores."""
    ran = set()

    def noted(name):
        real = getattr(kernels, name)

        @functools.wraps(real)
        def note(*given):
            ran.add(name)
            return real(*given)

        return note

    for name in kernels.__all__:
        monkeypatch.setattr(kernels, name, noted(name))
    plan = parse(plan)
    launches.step(launches.models_of(triton_ops(META), CONFIG), plan)
    assert "decode" in ran or "decode_quant" in ran or "decode_ragged" in ran
    assert ran <= {*ALWAYS, *plan.kernels}


def test_a_later_plan_whose_kernels_fail_is_refused(llm_of):
    llm = replace_check(llm_of("g3"), lambda names: {name: "hangs" for name in names if name == "decode_quant"})
    llm.ready(parse("snapkv"))
    with pytest.raises(ValueError, match="kernel decode_quant hangs; use --backend sdpa"):
        llm.ready(parse("full+int4"))


def replace_check(llm, function):
    import copy

    llm = copy.copy(llm)
    llm.check_kernels = function
    return llm


def test_without_a_flag_a_graph_runs_where_one_is_possible(llm_of):
    model = llm_of("g3").models.decode
    assert make("auto", model).name == "eager"  # no CUDA device
    runner, calls = Graphed(Eager(model), if_possible=True), []
    runner.inner.model = lambda *given: calls.append(given)

    class Waits:
        needs_host_sync = True

        def freeze(self):
            raise AssertionError

    runner.step(1, 2, Waits())
    assert len(calls) == 1 and runner.graph is None


def test_on_a_cpu_nothing_is_checked(tiny, monkeypatch):
    monkeypatch.setattr("nanokv.llm.verdicts", lambda *_: pytest.fail("checked"))
    llm = load(str(tiny("g3")[0]), dtype="float32")
    assert llm.check_kernels is None and llm.models.ops.why == ""
