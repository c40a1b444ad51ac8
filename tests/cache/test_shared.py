"""A prefix that all rows share is stored once, and changes nothing that a row computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import first, held_positions
from tiny import text

from nanokv import engine, parse
from nanokv.compiled import Compiled, CompileOptions
from nanokv.stores.dense import SLOT_COUNTERS
from nanokv.stores.shared import SharedPrefix

PREFIX = text(40, 1)
ROWS = [[*PREFIX, *text(n, 10 + n)] for n in (1, 9, 4)]
STEPS, TURN = [text(6, 20 + b) for b in range(3)], [text(5, 30 + b) for b in range(3)]
EXACT = ["full", "full+ragged", "full+turbo:pin=3", "full+rot4:block=8", "full+kvsharer:layers=1"]
# plans under which the copies of a prompt share whatever stays of it
COPIED = [
    "snapkv:budget=20,window=4,kernel=3",
    "adakv:budget=20,window=4,kernel=3",
    "knorm:budget=40%+turbo:k=4,v=3",
    "pyramidinfer:ratio=0.4,recent=6,sink=2,context=4",
]


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch):
    monkeypatch.setattr(engine, "SHARED_AT_LEAST", 8)


def talk(llm, plan, prompts, steps, turn, room=60, late=0, copies=1, chunk=None):
    """Logits (rows, 1 + single tokens and a turn and single tokens, vocab), and the session."""
    session = llm.session(room, chunk, plan)
    logits = [session.start(prompts, copies)[:, None]]
    columns = torch.tensor(steps)
    if late:
        session.reserve(late)
    logits += [session.feed(column[:, None])[:, None] for column in columns[:, :3].T]
    logits.append(session.feed(torch.tensor(turn), every_logit=True))
    if late:
        session.reserve(2 * late)
    logits += [session.feed(column[:, None])[:, None] for column in columns[:, 3:].T]
    return torch.cat(logits, 1), session


def ready(llm, plan: str):
    return llm.ready(parse(plan))


@pytest.mark.parametrize("plan", EXACT)
@pytest.mark.parametrize("model", first(1, ["g3", "mqa", "bias", "qwen3"]))
@pytest.mark.parametrize("ways", [{}, {"room": 0, "late": 20, "chunk": 17}])
def test_rows_with_a_shared_prefix_compute_what_each_would_alone(model, plan, ways, llm_of):
    llm = llm_of(model)
    plan = ready(llm, plan)
    together, session = talk(llm, plan, ROWS, STEPS, TURN, **ways)
    assert session.cache.shared == 40 and isinstance(session.cache.stores[0], SharedPrefix)
    alone = [talk(llm, plan, [ROWS[b]], STEPS[b : b + 1], TURN[b : b + 1]) for b in range(3)]
    close = 1e-3 if plan.store.state_type else 2e-4  # of a store that rounds, the last bit of a sum may decide a code
    for b, (logits, by_itself) in enumerate(alone):
        torch.testing.assert_close(together[b], logits[0], atol=close, rtol=close)
        assert held_positions(session.cache, b) == held_positions(by_itself.cache, 0)
    if plan.store.state_type:
        return
    for i, store in session.cache.stores.items():
        for b, row in enumerate(store.unpack()):
            (right,) = alone[b][1].cache.stores[i].unpack()
            torch.testing.assert_close(row.k, right.k, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(row.v, right.v, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", [*EXACT, *COPIED])
def test_the_copies_of_a_prompt_share_all_that_stays_of_it(plan, llm_of, monkeypatch):
    llm = llm_of("g3")
    plan, prompt = ready(llm, plan), text(50, 7)
    shared, session = talk(llm, plan, [prompt], STEPS, TURN, copies=3)
    assert session.cache.shared == 50
    late, _ = talk(llm, plan, [prompt], STEPS, TURN, copies=3, room=0, late=15)
    monkeypatch.setattr(engine, "SHARED_AT_LEAST", 1000)
    right, apart = talk(llm, plan, [prompt], STEPS, TURN, copies=3)
    assert apart.cache.shared == 0
    torch.testing.assert_close(shared, right, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(late, right, atol=2e-4, rtol=1e-4)
    assert [held_positions(session.cache, b) for b in range(3)] == [held_positions(apart.cache, b) for b in range(3)]


def test_a_prompt_that_is_the_beginning_of_another_shares_all_but_its_last_token(llm_of):
    llm, plan = llm_of("g3"), parse("full")
    together, session = talk(llm, plan, [PREFIX, ROWS[1]], STEPS[:2], TURN[:2])
    assert session.cache.shared == 39
    for b, ids in enumerate([PREFIX, ROWS[1]]):
        alone, _ = talk(llm, plan, [ids], STEPS[b : b + 1], TURN[b : b + 1])
        torch.testing.assert_close(together[b], alone[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "plan", "rows"),
    [
        ("g3", "snapkv:budget=20,window=4,kernel=3", ROWS),  # what stays of the prefix depends on what follows
        ("g3", "full+int4:group=8,residual=8", ROWS),  # the prefix's last group is rounded with what follows
        ("g3", "full+fp8", ROWS),  # a head's scale fits all of the prompt
        ("g3", "full+turbo:pin=45", ROWS),  # more pinned tokens than the prefix has
        ("g3", "knorm:budget=20+turbo:pin=30", [ROWS[1], ROWS[1]]),
        ("g3", "h2o:budget=20", [ROWS[1], ROWS[1]]),  # a row may lose any token
        ("g3", "streaming:sink=2,recent=60", [ROWS[1], ROWS[1]]),
        ("mistral", "full", ROWS),  # the model's own window overwrites the prefix
        ("g3", "full", [ROWS[1], text(50, 3)]),
    ],
)
def test_what_rows_may_lose_or_round_is_not_shared(model, plan, rows, llm_of):
    session = llm_of(model).session(4, plan=parse(plan))
    session.start(rows)
    assert session.cache.shared == 0


def test_the_receipt_counts_a_shared_prefix_once(llm_of):
    llm, sizes = llm_of("g3"), []
    for prompts in ([ROWS[1]], [ROWS[1]] * 8, [*ROWS, *ROWS[:2]]):
        session = llm.session(5, plan=parse("full"))
        session.start(prompts)
        sizes.append(session.report().bytes)
    per_token, counters = (
        3 * 2 * (2 * 16 * 4 + 4),
        3 * 2 * SLOT_COUNTERS,
    )  # three layers of two heads of 16 numbers in fp32
    assert sizes[0] == (49 + 5) * per_token + counters
    assert sizes[1] == 48 * per_token + counters + 8 * (6 * per_token + counters)
    assert "what stays of the first 40 once for 5 rows" in str(session.report())
    assert session.report().as_dict()["shared"] == 40 and "K 32 V 32 bits/elem" in str(session.report())


def test_a_compiled_step_reads_a_shared_prefix(llm_of, monkeypatch):

    llm = llm_of("g3")
    models = replace(llm.models, runner=Compiled(llm.models.decode, CompileOptions(backend="aot_eager")))
    right, _ = talk(llm, parse("full"), ROWS, STEPS, TURN)
    session = engine.Session(models, parse("full"), 60)
    logits = [session.start(ROWS)]
    logits += [session.feed(column[:, None]) for column in torch.tensor(STEPS)[:, :3].T]
    torch.testing.assert_close(torch.stack(logits, 1), right[:, :4], atol=2e-4, rtol=1e-4)
