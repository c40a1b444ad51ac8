"""The judge judged: tasks, one run for many plans, scores, fidelity, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys

import pytest
import torch
from helpers import ROOT
from tiny import text, write_seeded

from evals import quality, record, show
from evals.plots import method
from evals.quality import Answer, Item, judge, prompt_and_turns, solved
from evals.tasks import STANDARD, TASKS
from nanokv import parse
from nanokv.auto import choose
from nanokv.cache.plan import Plan
from nanokv.engine import Session, prefill
from nanokv.inspect import fidelity
from nanokv.inspect.dense import begin


def words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_its_answers_and_is_the_same_again(name):
    lengths = []
    for seed in range(12):
        task = TASKS[name](seed, 400, words)
        assert task == TASKS[name](seed, 400, words)
        assert task != TASKS[name](seed + 1, 400, words)
        for asks in task.turns:
            for ask in asks:
                assert ask.answer.strip() in task.context
                assert ask.answer not in ask.opening
                assert ask.answer[0] == " " and ask.opening[-1] != " "
        lengths.append(words(task.context))
    assert all(400 <= n < 520 for n in lengths)


def test_several_values_are_asked_for_in_the_order_of_the_text():
    for seed in range(40):
        task = TASKS["multivalue"](seed, 200, words)
        for asks in task.turns:
            at = [task.context.index(f"{ask.answer}.") for ask in asks]
            assert at == sorted(at) and len(set(at)) == 3


def test_the_most_frequent_words_are_asked_for():
    for seed in range(40):
        task = TASKS["frequent"](seed, 20, words)
        listed = task.context.replace('"', "").split()
        asked = [turn[0].answer.strip(' "') for turn in task.turns]
        n = sorted(map(listed.count, set(listed)), reverse=True)
        assert [listed.count(word) for word in asked] == n[:2] and n[0] > n[1] > n[2]


def test_needles_lie_where_they_should():
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        task = TASKS["needle"](1, 2000, words, depth=depth)
        at = task.context.index(task.turns[0][0].answer) / len(task.context)
        assert abs(at - depth) < 0.06
    assert [Item("needle", 9, s).depth for s in range(6)] == [0, 0.25, 0.5, 0.75, 1, 0]
    assert Item("common", 9, 3).depth is None


PLANS = [
    "full",
    "snapkv:budget=40,window=8,kernel=3",
    "snapkv:budget=25%,window=16,kernel=5,pool=avg,group=max",
    "streaming:sink=2,recent=20",
    "simlayer:threshold=0.3,recent=24",
    "simlayer:variant=light,recent=24",
    "simlayer:variant=decode,threshold=0.3,recent=24",
    "squeeze:budget=30,window=8,kernel=3",
    "pyramidinfer:ratio=0.5,recent=6,context=4",
    "kvzip:budget=30,piece=40",
    "kvzip:budget=20%,piece=40",
    "kvzip:budget=30,piece=40,sink=1",
]


@pytest.mark.parametrize("model", ["llama31", "g3", "mistral"])
def test_one_run_gives_every_plan_what_its_own_run_gives(model, llm_of, monkeypatch):
    runs = []
    monkeypatch.setattr("nanokv.inspect.dense.prefill", lambda *a: runs.append(a) or prefill(*a))
    llm, ids, then = llm_of(model), text(70, 3), text(9, 4)
    chunked = [] if model == "mistral" else ["dca:context=32"]  # which refuses sliding windows
    plans = [parse(p) for p in (*PLANS, *chunked)] + [Plan(share={2: 0}), Plan(parse(PLANS[1]).policy, share={2: 0})]
    seen = []
    for i, start in begin(llm, plans, ids, 9):
        alone = Session(llm.models, plans[i], 9)
        expected = [alone.start([ids]), alone.feed(torch.tensor([then]), every_logit=True)]
        for _ in range(2):  # a plan may be begun again
            session, before = start()
            assert torch.equal(before, expected[0])
            assert torch.equal(session.feed(torch.tensor([then]), every_logit=True), expected[1])
            assert session.report() == alone.report()
        seen.append(i)
    assert sorted(seen) == list(range(len(plans)))
    # without scoring passes, with shared layers, kvzip with either number of sinks, and dca
    assert len(runs) == 4 + len(chunked)


def test_feeding_many_tokens_tells_the_logits_after_each(llm_of):
    llm, ids, then = llm_of("llama31"), text(50, 1), text(8, 2)
    for plan in ("full", "simlayer:variant=decode,threshold=0.3,recent=24"):
        sessions = [Session(llm.models, parse(plan), 8) for _ in range(2)]
        for s in sessions:
            s.start([ids])
        every = sessions[0].feed(torch.tensor([then]), every_logit=True)
        single = torch.stack([sessions[1].feed(torch.tensor([[t]])) for t in then], 1)
        torch.testing.assert_close(every, single, atol=1e-4, rtol=1e-4)
        last = Session(llm.models, parse(plan), 8)
        last.start([ids])
        torch.testing.assert_close(last.feed(torch.tensor([then])), every[:, -1], atol=1e-4, rtol=1e-4)


def test_solved_is_what_greedy_would_write(llm_of):
    llm = llm_of("llama31")
    session = llm.session(16)
    made, _ = fidelity.follow(session, session.start([text(40, 5)]), 12, fidelity.greedy)

    def score(ids: list[int], answers: list[tuple[int, int]]) -> float:
        other = llm.session(16)
        before = other.start([text(40, 5)])
        return solved(before, other.feed(torch.tensor([ids]), every_logit=True)[0], Answer(ids, answers))

    assert score(made, [(0, 12)]) == score(made, [(3, 9)]) == 1
    wrong = [*made[:5], (made[5] + 1) % 96, *made[6:]]
    assert score(wrong, [(0, 5), (5, 6)]) == 0.5 and score(wrong, [(2, 7)]) == 0


def test_the_protocols_differ_in_where_the_first_opening_stands(llm_of):
    words = llm_of("llama31").tokenizer
    task = TASKS["multiquery"](0, 60, lambda t: len(t) // 4)
    aware, agnostic = (prompt_and_turns(task, words, protocol) for protocol in ("aware", "agnostic"))
    assert words.decode(aware[0]) == task.context + task.turns[0][0].opening
    assert words.decode(agnostic[0]) == task.context
    for prompt, turns in (aware, agnostic):
        whole = task.context + "".join(a.opening + a.answer for asks in task.turns for a in asks)
        assert words.decode(prompt + [i for t in turns for i in t.ids]) == whole
        for turn, asks in zip(turns, task.turns, strict=True):
            assert [words.decode(turn.ids[a:b]) for a, b in turn.answers] == [a.answer for a in asks]


def test_the_same_seed_gives_the_same_table_twice(llm_of):
    llm, plans = llm_of("llama31"), [parse("full"), parse("random:budget=64"), parse("snapkv:budget=64")]
    items = [Item(task, 60, seed) for task in ("needle", "keyvalue") for seed in range(2)]
    tables = []
    for _ in range(2):
        records = {i: judge(llm, plans, i) for i in items}
        tables.append(quality.summary("a model", ["full", "random", "snapkv"], records, 0.0))
    assert tables[0] == tables[1] and len(tables[0]) == 2
    sizes = [tables[0][0]["plans"][n]["aware"] for n in ("full", "random")]
    assert sizes[0]["full_bytes"] == sizes[1]["full_bytes"] and sizes[1]["bytes"] < 0.5 * sizes[0]["bytes"]
    assert "full" in show.quality(tables[0])


def test_scores_are_refused_where_full_is_below_its_floor():
    def found(full: float, other: float) -> list[dict]:
        size = {"bytes": 10, "full_bytes": 20}
        return [
            {"plan": p, "protocol": q, "scores": [s, 0.5], **size}
            for q in quality.PROTOCOLS
            for p, s in ((0, full), (1, other))
        ]

    records = {Item("needle", 100, 0): found(1.0, 0.5), Item("keyvalue", 100, 0): found(0.2, 0.9)}
    good, bad = quality.summary("smollm2-135m", ["full", "x"], records, None)
    cells = quality.grid(["full", "x"], records, [good, bad])
    assert cells["x"]["aware"] == [[100, 0.0, 0.5]]
    assert "refused" not in good and good["plans"]["x"]["aware"] == {
        "score": 0.5,
        "turn2": 0.5,
        "bytes": 10,
        "full_bytes": 20,
        "host_bytes": 0,
        "of_full": [[0, 1], [0, 0]],
    }
    assert "20%" in bad["refused"] and "25%" in bad["refused"] and list(bad["plans"]) == ["full"]
    shown = show.quality([good, bad])
    assert "! the full cache itself solves 20% of keyvalue" in shown and "90" not in shown
    assert show.averages([good, bad])["x"] == {"aware": 0.5, "agnostic": 0.5, "turn2": 0.5, "bytes": 10, "ratio": 2}
    assert show.averages([bad]) == {}
    assert "refused" in quality.summary("another model", ["full", "x"], records, None)[1]
    assert "refused" not in quality.summary("smollm2-135m", ["full", "x"], records, 0.1)[1]
    low = {Item("needle", 100, 0): found(0.0, 0.9)}
    assert quality.grid(["full", "x"], low, quality.summary("smollm2-135m", ["full", "x"], low, None)) == {}


def test_answers_are_fed_token_by_token_and_questions_at_once(llm_of):
    fed = []

    class Session:
        pos = torch.zeros(1, 1)

        def feed(self, tokens, every_logit):
            fed.append(tokens.tolist()[0])
            return torch.zeros(1, tokens.shape[1], 3)

    out = quality.feed_turn(Session(), quality.Answer([1, 2, 3, 4, 5, 6, 7], [(0, 2), (4, 7)]))
    assert fed == [[1], [2], [3, 4], [5], [6], [7]] and out.shape == (7, 3)


def test_needles_lie_where_they_are_asked_to(llm_of):
    tasks = [Item("needle", 4000, s, 0.5).make(llm_of("g3").tokenizer) for s in range(3)]
    for task in tasks:
        assert 0.45 < task.context.index("The secret code for") / len(task.context) < 0.55
    assert Item("needle", 400, 0).depth == 0 and Item("common", 400, 0, 0.5).depth is None


def test_a_plan_that_cannot_serve_a_text_says_why(llm_of):
    found = judge(
        llm_of("llama31"), [parse("full"), parse("snapkv:budget=1KiB"), parse("simlayer")], Item("keyvalue", 60, 0)
    )
    reasons = {r["plan"]: r.get("refused") for r in found}
    assert reasons[0] is None and "1KiB" in reasons[1] and "threshold" in reasons[2]
    # one protocol's refusal is the plan's
    fine = {**found[0], "plan": 1, "protocol": "agnostic", "scores": [1, 1], "bytes": 1, "full_bytes": 1}
    one = [*(r for r in found if r["plan"] == 0), {"plan": 1, "protocol": "aware", "refused": "why"}, fine]
    part = quality.summary("m", ["full", "x"], {Item("keyvalue", 60, 0): one}, 0.0)
    assert list(show.averages(part)) == ["full"] and "-" in show.quality(part)
    near = {(60, 0): quality.fidelity(llm_of("llama31"), [parse("full"), parse("simlayer")], 0, 60, 4)}
    said = show.fidelity(quality.merged(["full", "simlayer"], near))
    assert "threshold" in said
    found = judge(llm_of("llama31"), [parse("full"), parse("kvzip:budget=20")], Item("keyvalue", 300, 0))
    assert {r["plan"] for r in found if "more behind it" in r.get("refused", "")} == {1}
    with pytest.raises(ValueError, match="512 of this model's context"):
        judge(llm_of("llama31"), [parse("full")], Item("keyvalue", 600, 0))


def test_auto_takes_a_plan_for_each_prompt(llm_of):
    llm = llm_of("llama31")
    plans = quality.named(["full", "streaming:budget=25%", "auto"], ["25%"])
    assert list(plans) == ["full", "streaming:budget=25%", "auto 25%"]
    item = Item("keyvalue", 200, 0)
    found = quality.judge(llm, list(plans.values()), item)
    ids, turns = quality.prompt_and_turns(item.make(llm.tokenizer), llm.tokenizer, "agnostic")
    room = sum(len(t.ids) for t in turns)
    best = min(choose(llm, ids, "25%", room), key=lambda trial: (trial.kl, trial.bytes))
    (took,) = (r["took"] for r in found if r["plan"] == 2 and r["protocol"] == "agnostic")
    assert took == str(best.plan) and all("took" not in r for r in found if r["plan"] < 2)
    (part,) = quality.summary("m", list(plans), {item: found}, 0.0)
    assert part["plans"]["auto 25%"]["agnostic"]["took"] == {took: 1}
    assert f"auto 25% took for keyvalue at 200 tokens, agnostic: {took} (1)" in show.taken([part])
    assert [r["plan"] for r in quality.fidelity(llm, list(plans.values()), 0, 200, 4)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full+int4", "full+int4"),
        ("snapkv:window=8 25%", "snapkv:window=8"),
        ("snapkv:window=8,budget=25%+int4", "snapkv:window=8+int4"),
        ("kvzip:budget=64MiB", "kvzip"),
        ("kvzip:budget=25%,normed=true+int4", "kvzip:normed=true+int4"),
    ],
)
def test_a_picture_has_one_line_for_the_budgets_of_a_plan(name, expected):
    assert method(name) == expected


def test_plans_are_named_once_for_every_budget():
    plans = quality.named(["full", "snapkv:window=8", "streaming:budget=99", "simlayer"], ["25%", "64"])
    assert list(plans) == ["full", "snapkv:window=8 25%", "snapkv:window=8 64", "streaming:budget=99", "simlayer"]
    assert plans["snapkv:window=8 64"].policy.budget == 64
    from nanokv.policies import POLICIES
    from nanokv.stores import STORES

    assert {parse(t).names[0] for t in quality.registered()} == set(POLICIES)
    assert {parse(t).names[1] for t in quality.registered()} == set(STORES) - {"int"}  # which is int4


# ---- fidelity ------------------------------------------------------------------------------------------------------


def test_fidelity_is_the_formulas_as_loops():
    dice = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 7, generator=dice, dtype=torch.float64) * 2 for _ in range(2))
    words = torch.randint(0, 7, (40,), generator=dice).tolist()
    kl, same, nll = [], [], [0.0, 0.0]
    for x, y, w in zip(a.tolist(), b.tolist(), words, strict=True):
        p, q = ([math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in (x, y))
        kl.append(sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)))
        same.append(p.index(max(p)) == q.index(max(q)))
        nll = [nll[0] - math.log(p[w]), nll[1] - math.log(q[w])]
    f = fidelity.compare(a, b, words)
    assert f.kl_mean == pytest.approx(sum(kl) / 40) and f.top1 == pytest.approx(sum(same) / 40)
    low, high = sorted(kl)[38:]
    assert f.kl_p99 == pytest.approx(low + 0.61 * (high - low))  # linear between the two largest: 0.99 · 39 = 38.61
    assert [f.ppl_reference, f.ppl] == pytest.approx([math.exp(n / 40) for n in nll]) and f.first == same.index(False)
    again = fidelity.compare(a, a, words)
    assert (
        again.kl_mean == 0 and again.top1 == 1 and again.first is None and "same greedy choice everywhere" in str(again)
    )


def test_following_greedily_is_what_an_answer_is(llm_of):
    llm, ids = llm_of("g3"), text(30, 9)
    session = llm.session(20)
    tokens, rows = fidelity.follow(session, session.start([ids]), 20, fidelity.greedy)
    turn = llm.answer(llm.session(20), [ids], limit=20, ignore_eos=True)
    list(turn)
    assert tokens == turn.ids[0] and rows.argmax(-1).tolist() == tokens
    session = llm.session(20)
    assert (
        fidelity.follow(session, session.start([ids]), 20, fidelity.greedy, eos=(tokens[3],))[0]
        == tokens[: tokens.index(tokens[3]) + 1]
    )


def test_fidelity_of_plans_on_one_run(llm_of):
    llm, names = llm_of("llama31"), ["full", "again", "random"]
    plans = [parse("full"), parse("full"), parse("random:budget=32,window=8")]
    found = {(80, seed): quality.fidelity(llm, plans, seed, 80, 16) for seed in (1, 2)}
    rows = {r["plan"]: r for r in quality.merged(names, found)}
    for name in ("full", "again"):
        assert rows[name]["kl_mean"] == 0 and rows[name]["top1"] == 1 and rows[name]["departed"] == 0
        assert rows[name]["tokens"] == 32 and rows[name]["ppl"] == rows[name]["ppl_full"]
    assert rows["random"]["kl_mean"] > 1e-3 and rows["random"]["first"] > 0  # the first token is the prompt's own
    # by hand, on the first text
    ids = quality.text_of(llm, 1, 97)
    logits = []
    for plan in (plans[0], plans[2]):
        session = llm.session(17, plan=plan)
        logits.append(fidelity.follow(session, session.start([ids[:80]]), 17, lambda i, _: ids[80 + i])[1])
    hand = fidelity.compare(*logits, ids[80:], skip=1)
    alone = {r["plan"]: r for r in quality.merged(names, {(80, 1): found[80, 1]})}["random"]
    assert (hand.kl_mean, hand.kl_p99, hand.top1, hand.ppl) == pytest.approx(
        [alone[k] for k in ("kl_mean", "kl_p99", "top1", "ppl")]
    )
    lines = show.fidelity(list(rows.values())).splitlines()
    assert len(lines) == 4 and "+0.0%" in lines[2] and "never in 2" in lines[2]


# ---- runs that are broken off --------------------------------------------------------------------------------------


def test_a_journal_goes_on_but_not_under_other_settings(tmp_path):
    file = tmp_path / "x.part"
    journal = record.Journal(file, {"model": "a"})
    journal.keep("one", [1, 2])
    journal.keep("two", {"x": 0.5})
    with file.open("a") as f:
        f.write('{"key": "three", "va')  # killed while writing
    again = record.Journal(file, {"model": "a"})
    assert again.done == {"one": [1, 2], "two": {"x": 0.5}}
    again.keep("three", 3)
    assert set(record.Journal(file, {"model": "a"}).done) == {"one", "two", "three"}
    with pytest.raises(ValueError, match="another run"):
        record.Journal(file, {"model": "b"})
    assert len(record.Journal(file, {"model": "a"}).done) == 3


@pytest.fixture(scope="session")
def roomy(tiny, tmp_path_factory):
    """The tiny model with a context long enough for tasks told in letters."""
    path = tmp_path_factory.mktemp("roomy") / "m"
    shutil.copytree(tiny("llama31")[0], path)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def run(argv: list[str], capsys) -> tuple[int, str, str]:
    import bench

    code = bench.main(argv)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.exhaustive
def test_a_full_run_goes_on_where_it_was_broken_off(roomy, tmp_path, capsys, monkeypatch):
    flags = [
        "quality",
        "--full",
        "--model",
        roomy,
        "--dtype",
        "float32",
        "--lengths",
        "60",
        "--seeds",
        "2",
    ]
    flags += ["--tasks", "keyvalue", "multikey", "--plans", "snapkv:window=8", "--budgets", "50%", "--floor", "0"]
    flags += ["--json", str(tmp_path / "q.json")]
    real, calls = quality.judge, []

    def broken(llm, plans, item):
        if item.length == 60:  # others are the estimate's
            calls.append(item)
            if len(calls) == 3:
                raise KeyboardInterrupt
        return real(llm, plans, item)

    monkeypatch.setattr(quality, "judge", broken)
    code, _, err = run(flags, capsys)
    assert code == 130 and "plan: 4 plans × 4 texts" in err and "goes on" in err and not (tmp_path / "q.json").exists()
    code, out, err = run(flags, capsys)
    assert code == 0 and "2 of these are done already" in err
    assert (
        len(calls) == 5 and calls[3] == calls[2] and len(set(calls)) == 4
    )  # the two finished ones were not done again
    whole = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "q.json").read_text()) == whole and not list(tmp_path.glob("*.part"))
    (tmp_path / "q.json.part").write_text('{"model": "other"}\n')
    code, _, err = run(flags, capsys)
    assert code == 2 and "another run" in err and (tmp_path / "q.json.part").read_text() == '{"model": "other"}\n'
    (tmp_path / "q.json.part").unlink()
    monkeypatch.setattr(quality, "judge", real)
    code, out, _ = run(flags, capsys)
    assert {k: json.loads(out.splitlines()[-1])[k] for k in ("quality", "fidelity")} == {
        k: whole[k] for k in ("quality", "fidelity")
    }


def test_a_line_of_the_journal_that_is_no_finished_part_is_dropped(tmp_path):
    file, settings = tmp_path / "q.part", {"model": "m"}
    lines = [settings, {"key": "a", "value": 1}, 7, [], {"key": "b"}, {"key": [1], "value": 2}, None]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"key": "c", "val')
    journal = record.Journal(file, settings)
    assert journal.done == {"a": 1} and file.read_text().count("\n") == 2
    journal.keep("d", 2)
    assert record.Journal(file, settings).done == {"a": 1, "d": 2}


# ---- the command line ----------------------------------------------------------------------------------------------


def test_quick_speed_and_pictures(roomy, tmp_path, capsys):
    flags = ["--model", roomy, "--dtype", "float32", "--plans", "snapkv:window=8", "simlayer"]
    code, out, err = run([*flags, "--floor", "0", "--lengths", "60", "--seeds", "1", "--plot", str(tmp_path)], capsys)
    assert code == 0, err
    assert "! simlayer: simlayer knows no threshold" in out
    result = json.loads(out.splitlines()[-1])
    assert set(result["plans"]) == {"full", "random 25%", "streaming 25%", "snapkv:window=8 25%", "simlayer"}
    assert {
        "command",
        "commit",
        "machine",
        "torch",
        "model",
        "dtype",
        "quality",
        "fidelity",
        "speed",
        "seconds",
    } <= set(result)
    assert {p["task"] for p in result["quality"]} == set(STANDARD)
    assert len([x for x in out.splitlines() if x.startswith(tuple(result["plans"]))]) == 5
    code, out, err = run(
        ["speed", *flags, "--lengths", "40", "80", "--batches", "1", "2", "--plot", str(tmp_path)], capsys
    )
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["speed"]
    assert len(rows) == 20 and len([r for r in rows if "refused" in r]) == 4
    for r in rows:
        if "refused" in r:
            continue
        assert sum(r["kinds"].values()) == r["bytes"] and min(r["kinds"].values()) >= 0
        assert r["decode_tok_s"] > 0 and 0 < r["bus"] < 1
        # K and V of the receipt by hand: 3 layers, 2 KV heads of 16 dims, fp32
        tokens = r["length"] + 24 if r["plan"] == "full" else None
        assert tokens is None or r["kinds"]["K"] == tokens * r["batch"] * 3 * 2 * 16 * 4
    for name in ("pareto-60", "needles", "bytes", "speed", "speed-batch2"):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000


@pytest.mark.slow
@pytest.mark.exhaustive
def test_memory_is_the_receipt_of_processes_of_their_own(tiny, llm_of, capsys):
    flags = ["memory", "--model", str(tiny("llama31")[0]), "--dtype", "float32", "--lengths", "200", "--batches", "2"]
    code, out, err = run([*flags, "--plans", "snapkv:budget=64", "simlayer"], capsys)
    assert code == 0, err
    rows = {r["plan"]: r for r in json.loads(out.splitlines()[-1])["memory"]}
    llm = llm_of("llama31")
    for name in ("full", "snapkv:budget=64"):
        session = llm.session(8, plan=parse(name))
        session.start([quality.text_of(llm, seed, 200) for seed in (0, 1)])
        assert rows[name]["bytes"] == session.report().bytes  # the slots are there from the start
        assert rows[name]["peak_bytes"] > rows[name]["bytes"]
    assert rows["full"]["bytes"] > 2.5 * rows["snapkv:budget=64"]["bytes"]
    assert "threshold" in rows["simlayer"]["refused"]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nonsense"], "invalid choice"),
        (["quality", "--plans", "snapvk"], "did you mean snapkv"),
        (["quality", "--tasks", "poetry"], "invalid choice"),
        (["speed", "--full"], "--full is of quality"),
        (["quality", "--lengths", "0"], "at least 1"),
        (["quality", "--seeds", "0"], "at least 1"),
        (["quality", "--json", "/no/such/place/x.json"], "there is no directory"),
        (["quality", "--plot", "README.md"], "cannot be written"),
        (["auto", "--plans", "snapkv"], "--plans is of quick and quality"),
        (["kvpress", "--plans", "h2o"], "kvpress is compared in; there are 'snapkv'"),
        (["--lengths", "5", "6"], "takes one length"),
        (["endless", "--lengths", "19"], "endless needs at least 20"),
        (["prose", "--lengths", "999"], "prose needs at least 1000"),
        (["endless", "--seeds", "2"], "--seeds is of quick"),
        (["--model", "no-such-thing"], "no-such-thing"),
        (["quality", "--budgets", "0%"], "out of range"),
        (["--plans", "auto"], "auto takes another plan for each prompt"),
        (["speed", "--plans", "auto"], "auto takes another plan for each prompt"),
    ],
)
def test_what_is_refused(argv, says, capsys):
    import bench

    try:
        code = bench.main([*argv])
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    assert code == 2 and says in out.err and out.err.count("\n") == 1 and not out.out


# ---- peers ---------------------------------------------------------------------------------------------------------


def test_transformers_stands_beside_us_on_the_same_weights(tiny, llm_of):
    from evals.peers import Net

    llm, ids, then = llm_of("g3"), text(40, 2), text(6, 3)
    net = Net(str(tiny("g3")[0]), torch.float32, torch.device("cpu"))
    net.start(ids)
    session = llm.session(6)
    torch.testing.assert_close(net.logits, session.start([ids]), atol=1e-4, rtol=1e-4)
    assert net.bytes() == 2 * 3 * 40 * 2 * 16 * 4  # K and V, layers, tokens, KV heads, dims, fp32
    torch.testing.assert_close(
        net.feed(then), session.feed(torch.tensor([then]), every_logit=True)[0], atol=1e-4, rtol=1e-4
    )
    net.start(ids)
    first = int(net.logits.argmax())
    net.step()
    again = llm.session(6)
    again.start([ids])
    torch.testing.assert_close(net.logits, again.feed(torch.tensor([[first]])), atol=1e-4, rtol=1e-4)


def test_a_gap_between_the_programs_is_told_with_its_error():
    from evals.peers import PAIRS, PROTOCOLS, _differs

    lazy = next(p for p in PAIRS if p.name == "simlayer")
    ours, theirs = [(1.0, 9), (0.0, 9), (1.0, 9), (1.0, 9)], [(0.0, 9), (0.0, 9), (1.0, 9), (0.0, 9)]
    found = {
        ("t", name, who, q): v
        for name in ("full", "simlayer")
        for q in PROTOCOLS
        for who, v in (("ours", ours), ("theirs", theirs))
    }
    assert _differs(found, "t", "full", None) == "aware +50% ± 29%; agnostic +50% ± 29%"
    assert _differs(found, "t", "simlayer", lazy).endswith(lazy.differs)
    same = dict.fromkeys(found, ours)
    assert _differs(same, "t", "simlayer", lazy) == "" == _differs({}, "t", "full", None)


def test_the_best_of_llama_benchs_settings_is_taken(llm_of, tmp_path):
    """A stand-in prints what llama-bench prints: one run per file and flash-attention setting."""
    from evals import peers

    program = tmp_path / "llama-bench"
    program.write_text(
        f"""#!{sys.executable}
import json, sys
argv = sys.argv[1:]
files = [argv[i + 1] for i, x in enumerate(argv) if x == "-m"]
decode = "-d" in argv
speed = {{("f16.gguf", 0): 50, ("f16.gguf", 1): 40, ("bf16.gguf", 0): 30, ("bf16.gguf", 1): 60}}
print(json.dumps([
    {{"model_filename": "x/" + f, "model_type": "llama " + f[:-5].upper(), "flash_attn": bool(fa), "model_size": 1000,
      "avg_ts": speed[f, fa] if decode else 1000 - speed[f, fa]}}
    for f in files for fa in map(int, argv[argv.index("-fa") + 1].split(","))]))
"""
    )
    program.chmod(0o755)
    llm = llm_of("llama31")
    row = peers.llama_bench(llm, 512, str(program), ["f16.gguf", "bf16.gguf"])
    assert row["name"] == "llama.cpp llama BF16 -fa 1, in its own process"
    assert row["decode_tok_s"] == 60 and row["prefill_s"] == pytest.approx(512 / 970) and len(row["tried"]) == 8
    session = llm.session(1)
    session.start([text(64, 1)])
    assert row["bytes"] == session.report().full_bytes / 2 * 512 / 64  # ours is fp32
    assert row["read_s"] == (1000 + row["bytes"]) * 60


def test_what_is_not_installed_is_a_row_that_says_so(tiny, llm_of, monkeypatch):
    from evals import peers

    monkeypatch.setitem(sys.modules, "kvpress", None)
    monkeypatch.setattr(peers, "PAIRS", [p for p in peers.PAIRS if p.name == "snapkv"])
    monkeypatch.setattr(peers, "Compiled", peers.Eager)  # compiling is tried elsewhere
    llm = llm_of("llama31")
    assert "not installed" in peers.quality(llm, "x", peers.PAIRS, ["needle"], 100, 1, "50%", int)[0]["absent"]
    assert "not installed" in peers.llama_bench(llm, 512, "no-such-llama-bench", None)["absent"]
    assert "failed" in peers.llama_bench(llm, 512, sys.executable, ["x.gguf"])["absent"]
    assert "--gguf" in peers.llama_bench(llm, 512, sys.executable, None)["absent"]
    rows = peers.runners(llm, str(tiny("llama31")[0]), text(60, 1), "50%")
    ours = 2 * (1 + sum(peers._plan(p, "50%") is not None for p in peers.PAIRS))
    found = [next(rows) for _ in range(ours)]  # torch.compile looks into transformers where it has been imported
    monkeypatch.setitem(sys.modules, "transformers", None)
    found += rows
    assert found[-1][0] == "transformers" and "requirements-peers.txt" in found[-1][1]
    assert {r.name for r in found[:-1]} >= {"nanokv full", "nanokv snapkv"}
    assert (ROOT / "requirements-peers.txt").is_file()


def test_the_same_keys_stay_as_under_kvpress(tmp_path):
    """Against positions that kvpress kept, stored by kvpress_keys.py."""
    from kvpress_keys import FILE, PRESSES, prompt

    from nanokv import load

    write_seeded(tmp_path / "model", model_type="llama", architectures=["LlamaForCausalLM"])
    llm, stored = load(str(tmp_path / "model"), dtype="float32"), json.loads(FILE.read_text(encoding="utf-8"))
    assert set(stored["kept"]) == set(PRESSES)
    for plan, layers in stored["kept"].items():
        session = llm.session(1, plan=parse(plan))
        session.start([prompt()])
        for theirs, store in zip(layers, session.cache.stores.values(), strict=True):
            (mine,) = store.unpack()
            assert [p[:n].tolist() for p, n in zip(mine.pos[0], mine.length[0], strict=True)] == theirs, plan


@pytest.mark.slow
def test_against_kvpress_where_it_is_installed(tiny, llm_of):
    """At equal settings the same keys stay, fp32."""
    pytest.importorskip("kvpress", reason="kvpress is not installed (pip install -r requirements-peers.txt)")
    from evals import peers

    llm, ids, net = (
        llm_of("llama31"),
        text(400, 3),
        peers.Net(str(tiny("llama31")[0]), torch.float32, torch.device("cpu")),
    )
    for name in ("snapkv", "snapkv, kvpress's defaults", "streaming", "tova", "knorm", "keydiff", "expected"):
        pair = next(p for p in peers.PAIRS if p.name == name)
        session = llm.session(1, plan=parse(pair.ours.format("50%")))
        session.start([ids])
        net.start(ids, press=pair.build(0.5))
        for theirs, store in zip(net.cache.layers, session.cache.stores.values(), strict=True):
            (mine,) = store.unpack()
            assert mine.k.shape[2] == theirs.keys.shape[2] == 200
            for head in range(2):  # as sets: their order is another
                gap = torch.cdist(theirs.keys[0, head], mine.k[0, head], compute_mode="donot_use_mm_for_euclid_dist")
                if name == "knorm":  # a token said twice has keys of one norm, of which either may stay
                    norms = [x.norm(dim=-1).sort().values for x in (theirs.keys[0, head], mine.k[0, head])]
                    torch.testing.assert_close(*norms, atol=1e-4, rtol=0)
                    continue
                assert gap.min(0).values.max() < 1e-3 and gap.min(1).values.max() < 1e-3, name


@pytest.mark.slow
def test_ada_keeps_what_kvpress_does_not_mask(tiny, llm_of):
    """kvpress's Ada-KV frees nothing: it remembers which keys to hide from attention."""
    pytest.importorskip("kvpress", reason="kvpress is not installed (pip install -r requirements-peers.txt)")
    from evals import peers

    net = peers.Net(str(tiny("llama31")[0]), torch.float32, torch.device("cpu"))
    pair, ids = next(p for p in peers.PAIRS if p.name == "adakv"), text(400, 3)
    session = llm_of("llama31").session(1, plan=parse(pair.ours.format("50%")))
    session.start([ids])
    net.start(ids, press=pair.build(0.5))
    for layer, store in zip(net.net.model.layers, session.cache.stores.values(), strict=True):
        _, heads, hidden = layer.self_attn.masked_key_indices
        (mine,) = store.unpack()
        for head in range(2):
            held = set(range(400)) - set(hidden[heads == head].tolist())
            assert set(mine.pos[0, head, : mine.length[0, head]].tolist()) == held


@pytest.mark.slow
def test_merged_values_are_those_of_kvpress(tiny, llm_of):
    kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (pip install -r requirements-peers.txt)")
    from evals import peers

    ids, net = list(range(90)), peers.Net(str(tiny("llama31")[0]), torch.float32, torch.device("cpu"))
    net.start(ids, press=kvpress.MergingPress(press=kvpress.KnormPress(compression_ratio=1 - 58.5 / 90)))
    session = llm_of("llama31").session(1, plan=parse("knorm:budget=58,merge=nearest"))
    session.start([ids])
    for theirs, store in zip(net.cache.layers, session.cache.stores.values(), strict=True):
        (mine,) = store.unpack()
        for head in range(2):
            gap = torch.cdist(theirs.keys[0, head], mine.k[0, head], compute_mode="donot_use_mm_for_euclid_dist")
            assert gap.min(1).values.max() < 1e-3
            torch.testing.assert_close(mine.v[0, head][gap.argmin(1)], theirs.values[0, head], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_whole_of_peers_beside_kvpress(roomy, capsys):
    pytest.importorskip("kvpress", reason="kvpress is not installed (pip install -r requirements-peers.txt)")
    flags = ["peers", "--model", roomy, "--dtype", "float32", "--lengths", "300", "--seeds", "2", "--tasks", "needle"]
    code, out, err = run(flags, capsys)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    rows = {r["name"]: r for r in result["peers_quality"]}
    assert all(
        {"ours_aware", "theirs_aware", "ours_bytes", "theirs_bytes"} <= set(rows[n])
        for n in ("full", "snapkv", "streaming")
    )
    assert "theirs_aware" in rows["tova"]
    assert {r["name"] for r in result["peers_speed"]} >= {
        "nanokv full",
        "transformers DynamicCache float32",
        "kvpress tova",
        "llama.cpp",
    }


def test_compile_counts_graphs_and_times_both_ways(roomy, capsys):
    """By Dynamo alone, which counts the same graphs and needs no C++ compiler."""
    flags = ["compile", "--model", roomy, "--dtype", "float32", "--lengths", "40", "60", "--compile-backend", "eager"]
    code, out, err = run([*flags, "--plans", "full", "snapkv:budget=20,window=4"], capsys)
    assert code == 0, err
    full, snapkv = json.loads(out.splitlines()[-1])["compile"]
    assert full["graphs"] == snapkv["graphs"] == 2
    assert full["graphs_second_length"] == 1 and full["dynamic"] and len(full["recompiles"]) == 1
    assert snapkv["graphs_second_length"] == 0 and not snapkv["dynamic"]  # it keeps 20 tokens of either prompt
    for row in (full, snapkv):
        assert row["ratio"] == pytest.approx(row["eager_ms"] / row["compiled_ms"]) and row["cold_s"] > 0 < row["warm_s"]
    assert "graphs at 40" in out
    code, _, err = run(["compile", "--model", roomy, "--lengths", "40"], capsys)
    assert code == 2 and "compile takes two" in err


def test_endless_and_prose_print_their_tables(roomy, capsys):
    code, out, err = run(
        ["endless", "--model", roomy, "--dtype", "float32", "--lengths", "40", "--plans", "h2o:budget=20"], capsys
    )
    assert code == 0, err
    (row,) = json.loads(out.splitlines()[-1])["endless"]
    assert row["plan"] == "h2o:budget=20" and row["held"] == [20] * 10 and len(set(row["bytes"])) == 1
    plan = "streaming:positions=cache,sink=4,recent=60"
    code, out, err = run(
        ["prose", "--model", roomy, "--dtype", "float32", "--lengths", "1100", "--plans", plan], capsys
    )
    assert code == 0, err
    full, streaming = json.loads(out.splitlines()[-1])["prose"]
    assert full["plan"] == "full" and streaming["plan"] == plan and streaming["bytes"] > 0
    assert 10 < full["ppl"] != streaming["ppl"] and "against the first" in out


@pytest.mark.parametrize("kind", ["document", "code", "dialogue"])
def test_autos_row_is_that_of_the_plans_it_took(kind, llm_of):
    from evals import auto
    from nanokv.auto import choose, compare

    llm, seeds, n = llm_of("g3"), 2, 8
    row = auto.measure(llm, kind, "40%", 120, seeds, n, int)
    texts = [auto.KINDS[kind](llm, seed, 120 + n) for seed in range(seeds)]
    assert all(len(ids) == 120 + n for ids in texts) and texts[0] != texts[1]
    taken = [choose(llm, ids[:120], "40%", n)[0] for ids in texts]
    assert row["taken"] == [t.name for t in taken] and row["prefills"] > 0
    real = [compare(llm, {t.name: t.plan}, ids, n, n)[0] for t, ids in zip(taken, texts, strict=True)]
    for k in ("kl", "same", "bytes"):
        assert row["plans"]["auto"][k] == pytest.approx(sum(getattr(t, k) for t in real) / seeds)
    assert len(row["plans"]) > 5
