"""--policy auto: what it tries, what it measures, and what it takes."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import text

import generate
from nanokv import parse
from nanokv.auto import CANDIDATES, HELD_BACK, ROUNDED, choose
from nanokv.engine import Session


@pytest.mark.parametrize(("n", "held"), [(300, HELD_BACK), (100, 25)])
def test_trials_are_divergences_from_the_full_cache(n, held, llm_of):
    llm, ids = llm_of("g3"), text(n, seed=4)
    trials = choose(llm, ids, "40%", 8)
    assert {t.name for t in trials} <= set(CANDIDATES) and len(trials) > 4
    assert [t.kl for t in trials] == sorted(t.kl for t in trials) and trials[0].kl > 0

    def after(plan):
        session = Session(llm.models, plan, held)
        session.start([ids[:-held]])
        return session.feed(torch.tensor([ids[-held:]]), every_logit=True)[0].double().log_softmax(-1), session.report()

    full, _ = after(parse("full"))
    for t in (trials[0], trials[-1]):
        other, report = after(parse(t.name).with_budget("40%"))
        assert t.kl == pytest.approx((full.exp() * (full - other)).sum(-1).mean().item(), abs=1e-6)
        assert t.same == (full.argmax(-1) == other.argmax(-1)).double().mean()
        assert t.bytes == report.bytes


def test_a_size_lets_plans_that_round_compete_for_the_same_bytes(llm_of):
    trials = choose(llm_of("g3"), text(300, seed=4), "180KiB", 8)
    assert {t.name for t in trials} & set(ROUNDED)
    assert all(t.bytes <= 180 * 2**10 for t in trials)


def test_what_cannot_be_tried_is_refused(llm_of):
    with pytest.raises(ValueError, match="name a plan"):
        choose(llm_of("g3"), text(63), "25%", 8)
    with pytest.raises(ValueError, match="no plan can serve this prompt under a budget of 1KiB"):
        choose(llm_of("g3"), text(300), "1KiB", 8)


def test_the_command_takes_the_best_plan(tiny, tmp_path, capsys):
    model, prompt, file = str(tiny("g3")[0]), tmp_path / "p.txt", tmp_path / "o.json"
    prompt.write_text("the quick brown fox jumps over the lazy dog " * 8)
    flags = ["--model", model, "--prompt-file", str(prompt), "-n", "4", "--dtype", "fp32", "--json", str(file)]
    assert generate.main([*flags, "--policy", "auto", "--kv-budget", "30%"]) == 0
    err = capsys.readouterr().err
    best = next(line for line in err.splitlines() if line.startswith("auto takes ")).split()[2]
    tried = next(line for line in err.splitlines() if line.startswith("auto: KL"))
    assert tried.split("better: ")[1].startswith(best)
    record = json.loads(file.read_text())
    plan, trials = record["policy"], record["auto"]["trials"]
    assert trials[0]["name"] == best and record["auto"]["seconds"] > 0 and len(trials) == tried.count("·") + 1
    assert plan.partition(":")[0] == best.partition(":")[0] and plan != "full+dense"
    for more in (["--interactive"], ["--draft", "lookup"], ["--k-bits", "4"], []):
        budget = ["--kv-budget", "30%"] if more else []
        assert generate.main(["--model", model, "-p", "x", "--policy", "auto", *budget, *more]) == 2
        err = capsys.readouterr().err
        assert (f"leave out {more[0]}" if more else "give --kv-budget") in err and err.count("\n") == 1


def test_auto_is_explained_and_is_no_part_of_a_plan(capsys):
    assert generate.main(["--list-policies", "auto"]) == 0
    assert "--kv-budget" in capsys.readouterr().out
    for plan in ("auto+int4", "auto:budget=25%"):
        with pytest.raises(ValueError, match="--policy auto and --kv-budget"):
            parse(plan)
