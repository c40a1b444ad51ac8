"""Texts that run on: budgets that hold over 1,500 tokens, positions inside the cache, bytes of heads of different lengths."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import STEPS, every, run
from tiny import text

from evals import long
from nanokv import parse
from nanokv.model.rope import angles, rotate

# most that a head may hold, by plan
BOUNDED = {
    "streaming:sink=4,recent=60": 64,
    "h2o:budget=64": 64,
    "tova:budget=64": 64,
    "keyformer:budget=64": 64,
    "cascade:budget=64": 64,
    "snapkv:budget=64,window=8,every=32": 96,
    "expected:budget=64,every=128": 192,
    "knorm:budget=64,every=32,layers=pyramid": None,
    "scissorhands:budget=64,every=16,window=32": 64,
    "adakv:budget=64,window=8,every=32": None,
}


@pytest.mark.parametrize("plan", every(4, BOUNDED))
def test_a_budget_holds_over_400_tokens_in_memory_that_does_not_grow(plan, llm_of):
    """Far past the model's context of 512. Sums over heads and layers where these compete."""
    llm = llm_of("g3")
    session = llm.session(400, plan=parse(plan))
    logits, sizes, places = session.start([text(200, seed=3)]), set(), set()
    for t in range(400):
        logits = session.feed(logits.argmax(-1, keepdim=True))
        counts = [s.slots.length for s in session.cache.stores.values()]
        if BOUNDED[plan]:
            assert max(int(c.max()) for c in counts) <= BOUNDED[plan], t
        assert sum(int(c.sum()) for c in counts) <= 3 * 2 * (BOUNDED[plan] or 96), t
        if t > 200:
            sizes.add(session.report().bytes)
            places |= {x.data_ptr() for s in session.cache.stores.values() for x in (*s.planes[0], *s.planes[1])}
    assert len(sizes) == 1 and len(places) == 6  # the very same storages
    assert logits.isfinite().all() and session.seen == [600]


def test_the_bench_reports_both_ends_of_a_long_run(llm_of):
    found = long.endless(llm_of("g3"), parse("h2o:budget=64"), 400)
    assert found["new_tokens"] == 400 and len(set(found["bytes"][1:])) == 1 and set(found["held"]) == {64}
    assert found["early_tok_s"] > 0 < found["late_tok_s"]


def test_perplexity_in_pieces_and_in_chunks_is_the_models(llm_of, monkeypatch):
    """Full attention over 300 tokens, by both roads, against the model's own one-shot odds."""
    llm, ids = llm_of("g3"), text(300, seed=4)
    model = llm.models.prefill
    from nanokv.cache.prefill import PromptCache

    cache = PromptCache(parse("full"), torch.tensor(ids), llm.models.new_context())
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([ids]), torch.arange(300)[None], cache)[0]
    nll = torch.nn.functional.cross_entropy(model.logits(hidden)[:-1], torch.tensor(ids[1:]), reduction="none")
    right = nll[59:].mean().exp().item()  # tokens 60 … 299
    assert long.prose(llm, parse("full"), ids, 20)["ppl"] == pytest.approx(right, rel=1e-4)
    assert long.pieces(llm, ids, 20) == pytest.approx(right, rel=1e-4)
    monkeypatch.setattr(long, "PIECE", 120)
    judged, part = [], None
    for a in range(0, 240, 60):  # token by token: what the piece whose first half lies before it says
        part = PromptCache(parse("full"), torch.tensor(ids[a : a + 120]), llm.models.new_context())
        with torch.inference_mode():
            hidden = model.hidden(torch.tensor([ids[a : a + 120]]), torch.arange(120)[None], part)[0]
            odds = model.logits(hidden).log_softmax(-1)
        judged += [-odds[t - a - 1, ids[t]] for t in range(a + 60, a + 120)]
    assert long.pieces(llm, ids, 60) == pytest.approx(torch.stack(judged).mean().exp().item(), rel=1e-4)


def by_rank(llm, ids: list[int], T: int, sink: int, recent: int) -> torch.Tensor:
    """Logits of the tokens from T−1 on as the StreamingLLM paper has them: keys without rotation, each turned anew for every query to its
    place among those held, the query to the last place. Layers of plain loops.
    """

    class Layer:
        owns = True

        def __init__(self):
            self.k, self.v = [], []

        def attend(self, q, k, v, pos):
            self.k += list(
                rotate(k.transpose(1, 2), angles(llm.models.prefill.inv_freq, -pos))[0]
            )  # (Hkv,D), as before rotation
            self.v += list(v[0].transpose(0, 1))
            out, heads = torch.zeros_like(q), k.shape[1]
            for t, i in enumerate(pos[0].tolist()):
                held = [j for j in range(i + 1) if i < T or j < sink or j > i - recent]
                rank = torch.arange(len(held))[None]
                keys = rotate(torch.stack([self.k[j] for j in held])[None], angles(llm.models.prefill.inv_freq, rank))[
                    0
                ]
                raw = rotate(
                    q[:, :, t : t + 1].transpose(1, 2), angles(llm.models.prefill.inv_freq, -pos[:, t : t + 1])
                )
                now = rotate(raw, angles(llm.models.prefill.inv_freq, rank[:, -1:]))[0, 0]  # (H,D)
                values = torch.stack([self.v[j] for j in held])
                for h in range(len(now)):
                    kv = h * heads // len(now)
                    weight = (keys[:, kv] @ now[h] / q.shape[-1] ** 0.5).softmax(0)
                    out[0, h, t] = weight @ values[:, kv]
            return out

    model, cache = llm.models.prefill, SimpleNamespace(layers=[Layer() for _ in range(llm.config.num_hidden_layers)])
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids]), torch.arange(len(ids))[None], cache)
        return model.logits(hidden)[0, T - 1 :]


@pytest.mark.parametrize("store", ["dense", "ragged"])
@pytest.mark.parametrize(("T", "sink", "recent"), [(60, 3, 12), (8, 3, 12), (2, 4, 7), (60, 0, 12)])
def test_positions_in_the_cache_are_the_papers(T, sink, recent, store, llm_of):
    llm, prompt, more = llm_of("g3"), text(T, seed=5), text(STEPS, seed=6)
    plan = f"streaming:sink={sink},recent={recent},positions=cache+{store}"
    logits, _ = run(llm, plan, [prompt], [more])
    right = by_rank(llm, prompt + more, T, sink, recent)
    torch.testing.assert_close(logits[0], right, atol=2e-4, rtol=2e-4)
    away, _ = run(llm, plan.replace("cache", "absolute"), [prompt], [more])
    far = (away[0] - right).abs().amax(-1) > 1e-3
    first = max(T, sink + recent) - T + 1 if sink else STEPS + 1  # only then something lies between sinks and the rest
    assert not far[:first].any() and far[first:].all()


def test_positions_in_the_cache_hold_for_rows_and_turns(llm_of):
    llm, plan = llm_of("g3"), "streaming:sink=3,recent=12,positions=cache"
    prompts, more = [text(60, seed=5), text(9, seed=7), text(2, seed=8)], [text(STEPS, seed=s) for s in (6, 9, 10)]
    together, _ = run(llm, plan, prompts, more)
    for row in range(3):
        alone, _ = run(llm, plan, [prompts[row]], [more[row]])
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
    session = llm.session(9, plan=parse(plan))
    session.start([prompts[1][:5]])
    turn = session.feed(torch.tensor([prompts[1][5:]]))  # nothing is evicted yet: a turn is exact
    torch.testing.assert_close(turn[0], together[1, 0], atol=1e-4, rtol=1e-4)


def test_moving_the_whole_text_changes_nothing_but_the_sinks(llm_of):
    """Under positions=cache a text of 20,000 tokens looks like one of 200: the same held tokens give the same odds."""
    llm, plan, last = llm_of("g3"), parse("streaming:sink=4,recent=28,positions=cache"), []
    for length in (100, 700):
        session = llm.session(40, plan=plan)
        session.start([text(4, seed=1)])
        filler = text(length, seed=2)
        session.reserve(length + 200)
        for a in range(0, length, 20):
            session.feed(torch.tensor([filler[a : a + 20]]))
        for token in text(100, seed=3):  # three layers forget what is more than 3 · 28 tokens ago
            logits = session.feed(torch.tensor([[token]]))
        last.append(logits)
    torch.testing.assert_close(*last, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("room", [0, 7, 40])
@pytest.mark.parametrize(
    "plan", ["adakv:budget=24,window=4", "adakv:budget=24,window=4,layers=pyramid", "h2o:budget=24,heads=ada", "corm"]
)
def test_ragged_heads_take_their_own_bytes_and_no_more(plan, room, llm_of):
    """(kept + room) slots a head, K, V and position each, and what Slots and votes say they take."""
    llm, part = llm_of("g3"), parse("corm:recent=8,window=8" if plan == "corm" else plan)
    session = llm.session(room, plan=part)
    session.start([text(60, seed=5)])
    evicts = plan.startswith("h2o")
    ahead = 0 if evicts else min(room, part.policy.rescore_every) if part.policy.rescore_every else room
    slot = 2 * llm.config.head_dim * 4 + 4 + (4 if part.policy.decode_request else 0)
    for line in session.report().layers:
        slots = sum(n + ahead for n in line.kept[0])
        bookkeeping = 2 * (4 * 4 + 8)  # cursor, limit, wanted, sink int32 and first int64, of two heads
        spare = 4 if part.policy.decode_request else 0  # a place for votes that belong to no slot
        assert line.bytes == slots * slot + bookkeeping + spare
    if plan.startswith(("adakv", "h2o")):
        assert sum(sum(x.kept[0]) for x in session.report().layers) == 3 * 2 * 24
        assert any(len(set(x.kept[0])) > 1 for x in session.report().layers)
