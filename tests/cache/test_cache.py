"""Static slots: the prefix invariant, rings, turns, room, sharing, watching policies, and the receipt."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import PLANS, every, first, one_each, run, storages
from oracle import streaming
from tiny import text

from nanokv import parse
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.plan import Plan
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


@pytest.mark.parametrize("plan", one_each(PLANS))
@pytest.mark.parametrize("model", first(1, ["windows", "g3"]))
def test_the_receipt_equals_the_storages_the_cache_reaches(plan, model, llm_of):
    from nanokv.cache.context import Context

    llm, prompts = llm_of(model), [text(60, seed=5), text(31, seed=7)]
    session = llm.session(9, None, parse(plan))
    session.start(prompts)
    for _ in range(5):
        session.feed(torch.tensor([[1], [2]]))
    report = session.report()
    assert report.bytes == storages(session.cache, {}, (Context, type(llm.config)))
    assert 0 < report.used_bytes <= report.bytes
    assert report.full_bytes == (65 + 36) * 3 * 2 * llm.config.num_key_value_heads * llm.config.head_dim * 4
    assert [x.kept for x in report.layers] == [session.cache.stores[i].slots.length.tolist() for i in range(3)]


@pytest.mark.parametrize("plan", one_each(PLANS))
def test_live_bytes_are_those_of_a_cache_without_spare_room(plan, llm_of):
    llm, prompt = llm_of("g3"), text(60, seed=5)
    roomy, tight = llm.session(50, None, parse(plan)), llm.session(2, None, parse(plan))
    for session in (roomy, tight):
        session.start([prompt])
        session.feed(torch.tensor([[1, 2]]))
    if plan.endswith("+dense"):  # heads of different lengths, padded to the longest: it must not look free
        assert tight.report().bytes > tight.report().used_bytes
    elif "variant=decode" not in plan:  # there the room is also that of a token which was spent before packing
        assert tight.report().bytes == tight.report().used_bytes
    assert roomy.report().used_bytes == tight.report().used_bytes


BUDGETED = [
    "snapkv:window=4",
    "random:window=4",
    "streaming:sink=2",
    "snapkv:window=4,every=8",
    "adakv:window=4,layers=pyramid",
]
BUDGETED += [
    "h2o",
    "tova",
    "keyformer",
    "cascade",
    "scissorhands:every=8,recent=2",
    "knorm:every=3",
    "keydiff",
    "expected",
    "h2o:heads=ada",
]


@pytest.mark.parametrize("plan", ["full", "snapkv:budget=20,window=4", "h2o:budget=20", "streaming:sink=2,recent=10"])
@pytest.mark.parametrize("room", [4, 60])
def test_the_estimate_is_what_the_cache_takes(plan, room, llm_of):
    llm = llm_of("g3")
    session = llm.session(room, plan=parse(plan))
    session.start([text(60)])
    estimate = session.plans[0].device_bytes(llm.config, torch.float32, 60, room) * llm.config.num_hidden_layers
    assert estimate == pytest.approx(session.report().bytes, rel=0.1)


@pytest.mark.parametrize("budget", ["64KiB", "200KiB"])
@pytest.mark.parametrize("policy", BUDGETED)
def test_a_budget_in_bytes_holds_for_the_whole_cache(policy, budget, llm_of):
    llm = llm_of("g3")
    plan = parse(policy).with_budget(budget)
    session = llm.session(10, None, plan)
    session.start([text(300, seed=5)])
    for _ in range(10):
        session.feed(torch.tensor([[1]]))
    limit = int(budget[:-3]) * 1024
    assert 0.9 * limit < session.report().bytes <= limit


@pytest.mark.parametrize("model", first(1, ["mistral", "g3"]))
@pytest.mark.parametrize("plan", every(3, PLANS))
def test_valid_slots_are_a_prefix_and_hold_what_the_rule_says(plan, model, llm_of):
    llm, prompts = llm_of(model), [text(60, seed=5), text(7, seed=8)]
    session = llm.session(40, None, parse(plan))
    session.start(prompts)
    session.feed(torch.tensor([[1], [1]]))
    for step in range(30):
        for store in session.cache.stores.values():
            s = store.slots
            for row in range(2):
                for head in range(2):
                    n, limit = s.length[row, head].item(), s.limit[row, head].item()
                    held = s.pos[row, head].tolist()
                    assert all(p >= 0 for p in held[:n]) and all(p == -1 for p in held[n:]) and n <= limit
                    looked = (
                        session.cache.plan.policy.rescore_every and session.cache.since_rescore == 0
                    )  # nothing need be as new as that
                    assert len(set(held[:n])) == n and (looked or max(held[:n]) == session.seen[row] - 1)
        session.feed(torch.tensor([[step], [step]]))


def test_a_ring_never_overwrites_sinks_and_holds_the_most_recent(llm_of):
    session = llm_of("g3").session(60, None, parse("streaming:sink=3,recent=7"))
    session.start([text(5, seed=1)])
    for step in range(60):
        session.feed(torch.tensor([[step]]))
        held = session.cache.stores[1].unpack()[0].pos[0, 1].tolist()
        assert held == streaming(0, 3, 7, now=session.seen[0] - 1)


@pytest.mark.parametrize("plan", every(3, PLANS))
@pytest.mark.parametrize("turn", first(1, [33, 2]))
def test_a_turn_leaves_the_slots_that_single_tokens_leave(plan, turn, llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(turn, seed=6)
    one, many = llm.session(turn, None, parse(plan)), llm.session(turn, None, parse(plan))
    one.start([prompt])
    many.start([prompt])
    for token in more:
        one.feed(torch.tensor([[token]]))
    many.feed(torch.tensor([more]))
    for layer in range(3):
        a, b = one.cache.stores[layer].unpack()[0], many.cache.stores[layer].unpack()[0]
        assert torch.equal(a.pos, b.pos) and torch.equal(a.length, b.length)


@pytest.mark.parametrize("plan", [p for p in PLANS if "roll" in p or p.startswith(("full", "snapkv", "random"))])
@pytest.mark.parametrize("model", first(1, ["mistral", "g3"]))
def test_where_nothing_is_evicted_a_turn_is_exact(plan, model, llm_of):
    llm, prompts, more = llm_of(model), [text(60, seed=5), text(20, seed=9)], text(15, seed=6)
    logits, _ = run(llm, plan, prompts, [more, more])
    session = llm.session(15, None, parse(plan))
    session.start(prompts)
    first = session.feed(torch.tensor([more[:4]] * 2))
    second = session.feed(torch.tensor([more[4:14]] * 2))
    torch.testing.assert_close(first, logits[:, 4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second, logits[:, 14], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", every(3, PLANS))
def test_more_room_in_the_middle_changes_nothing(plan, llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(14, seed=6)
    logits, _ = run(llm, plan, [prompt], [more])
    session = llm.session(5, None, parse(plan))
    session.start([prompt])
    for t, token in enumerate(more):
        if t == 5:
            session.reserve(20)
        out = session.feed(torch.tensor([[token]]))
        torch.testing.assert_close(out[0], logits[0, t + 1], atol=1e-5, rtol=1e-5)


def test_a_full_cache_refuses_instead_of_overwriting(llm_of):
    session = llm_of("g3").session(3)
    session.start([text(10)])
    session.feed(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="room for 0 more tokens and 1 come"):
        session.feed(torch.tensor([[4]]))
    assert session.cache.stores[0].slots.length.max() == 13


def test_copies_of_one_prompt_go_their_own_ways(llm_of):
    llm, prompt = llm_of("g3"), text(60, seed=5)
    for plan in ("snapkv:budget=20,window=4", "simlayer:variant=decode,threshold=0,sink=2,recent=16"):
        session = llm.session(14, None, parse(plan))
        first = session.start([prompt], copies=2)
        assert torch.equal(first[0], first[1])
        out = [session.feed(torch.tensor([[a], [b]])) for a, b in zip(text(6, seed=1), text(6, seed=2), strict=True)][
            -1
        ]
        for row, seed in enumerate((1, 2)):
            alone = llm.session(14, None, parse(plan))
            alone.start([prompt])
            last = [alone.feed(torch.tensor([[t]])) for t in text(6, seed=seed)][-1]
            torch.testing.assert_close(out[row], last[0], atol=1e-4, rtol=1e-4)


def shared(plan: str) -> Plan:
    part = parse(plan)
    return Plan(part.policy, part.store, {2: 0}, part.names)


class Swapped:
    """A full cache in which layer 2 reads what layer 0 stored: the sharing oracle, by concatenation."""

    def __init__(self):
        self.layers, self.k, self.v = (
            [SwappedLayer(self, 0, True), SwappedLayer(self, 1, True), SwappedLayer(self, 0, False)],
            {},
            {},
        )


class SwappedLayer:
    def __init__(self, cache, owner: int, owns: bool):
        self.cache, self.owner, self.owns = cache, owner, owns

    def attend(self, q, k, v, pos):
        c = self.cache
        if self.owns:
            c.k[self.owner], c.v[self.owner] = k, v
        return torch.nn.functional.scaled_dot_product_attention(
            q, c.k[self.owner], c.v[self.owner], is_causal=True, enable_gqa=True
        )


def test_a_shared_layer_owns_no_bytes_and_reads_its_owners(llm_of):
    llm, ids = llm_of("g3"), text(50, seed=5)
    session = llm.session(20, None, shared("full"))
    ours = [session.start([ids[:35]])] + [session.feed(torch.tensor([[t]])) for t in ids[35:40]]
    ours.append(session.feed(torch.tensor([ids[40:]])))
    model = llm.models.prefill
    with torch.no_grad():
        theirs = model.logits(model.hidden(torch.tensor([ids]), torch.arange(50)[None], Swapped()))[0]
    torch.testing.assert_close(torch.cat(ours), theirs[[*range(34, 40), 49]], atol=1e-4, rtol=1e-4)
    lines = session.report().layers
    assert lines[2].bytes == 0 and lines[2].owner == 0 and lines[0].bytes > 0


@dataclass(frozen=True, kw_only=True)
class ToyHeavy(Policy):
    """A heavy hitter in few lines, to hold the watching side of the interface: evict the least voted but the last `recent`."""

    budget: int = 12
    recent: int = 4
    request = ScoreRequest(last_queries=None)
    decode_request = ScoreRequest(over_group="mean")
    eviction = "score"

    def keep(self, p: Prompt) -> Kept:
        votes = p.attention.sum(0, keepdim=True)
        kept = Kept.top(p, votes.masked_fill(p.recent(self.recent), torch.inf), self.budget, limit=self.budget)
        return replace(kept, running_scores=votes.gather(2, kept.pos.clamp(min=0).long()))

    def slot_scores(self, s: Slots, pos):
        return s.running_scores.masked_fill(s.pos > pos[:, None] - self.recent, torch.inf)

    def update_scores(self, s: Slots, votes, pos):
        return s.running_scores[:, :, : votes.shape[3]] + votes.sum(0)


def test_a_policy_chooses_across_layers_or_rescores(llm_of):
    @dataclass(frozen=True, kw_only=True)
    class Both(ToyHeavy):
        cross_layer = True
        rescore_every = 4

    with pytest.raises(ValueError, match="chooses across layers and rescores"):
        llm_of("g3").session(4, None, Plan(Both(), parse("full").store)).start([[1, 2, 3]])


@pytest.mark.parametrize("share", [{}, {2: 0}])
def test_a_watching_policy_sees_every_steps_votes(share, llm_of):
    llm, prompt = llm_of("g3"), text(20, seed=5)
    plan = Plan(ToyHeavy(budget=12), parse("full").store, share)
    session = llm.session(30, None, plan)
    session.start([prompt])
    before = [s.slots.running_scores.clone() for s in session.cache.stores.values()]
    for t in range(30):
        session.feed(torch.tensor([[t]]))
        for layer, (store, old) in enumerate(zip(session.cache.stores.values(), before, strict=True)):
            s = store.slots
            assert s.length.tolist() == [[12, 12]] and set(range(session.seen[0] - 4, session.seen[0])) <= set(
                s.pos[0, 0].tolist()
            )
            readers = 2 if share and layer == 0 else 1
            stayed = (
                old.sum(-1) + readers - s.running_scores.sum(-1)
            )  # mass gained is one per reader, lost only with the evicted
            assert (stayed >= -1e-4).all() and (stayed <= old.amax(-1) + 1e-4).all()
        before = [s.slots.running_scores.clone() for s in session.cache.stores.values()]


def test_nothing_of_a_session_outlives_it(llm_of):
    def kv_tensors() -> int:
        gc.collect()
        return sum(1 for x in gc.get_objects() if type(x) is torch.Tensor and x.dim() == 4)

    llm = llm_of("g3")
    llm.last = None
    before = kv_tensors()
    for plan in PLANS:
        session = llm.session(4, None, parse(plan))
        session.start([text(60)])
        session.feed(torch.tensor([[1]]))
    llm.last = session = None
    assert kv_tensors() == before


@pytest.mark.parametrize("share", [{}, {2: 0}])
@pytest.mark.parametrize(
    "plan", ["streaming:sink=4,recent=30,positions=cache", "snapkv:budget=20,window=4,every=8", "h2o:budget=20"]
)
def test_a_turn_longer_than_the_models_window_has_an_answer(plan, share, llm_of):
    llm, part = llm_of("mistral"), parse(plan)
    session = llm.session(80, None, Plan(part.policy, part.store, share, part.names))
    session.start([text(10, seed=5)])
    assert session.feed(torch.tensor([text(60, seed=6)]), every_logit=True).isfinite().all()


def test_a_refused_turn_leaves_the_cache_whole(llm_of):
    session = llm_of("g3").session(3, None, parse("full"))
    session.start([text(10)])
    with pytest.raises(ValueError, match="room for 3"):
        session.feed(torch.tensor([[1, 2, 3, 4]]))
    assert session.intact and session.feed(torch.tensor([[1, 2, 3]])).isfinite().all()


SAVED = ["h2o:budget=20", "corm:window=6,recent=8,every=4", "adakv:budget=20,window=4,every=8", "cascade:budget=20"]


@pytest.mark.parametrize("plan", SAVED)
def test_a_saved_cache_goes_on_as_the_one_that_was_saved(plan, llm_of, tmp_path):
    from nanokv.save import restore, save

    llm, plan = llm_of("g3"), parse(plan)
    session = llm.session(20, None, plan)
    session.start([text(60, seed=5)])
    save(llm, session, tmp_path / "c")
    again = restore(llm, tmp_path / "c", 20)
    for t in text(17, seed=6):
        torch.testing.assert_close(*(s.feed(torch.tensor([[t]])) for s in (session, again)), atol=1e-5, rtol=1e-5)
    if plan.policy.rescore_every:
        with pytest.raises(ValueError, match="save right after the prompt"):
            save(llm, session, tmp_path / "d")
    else:
        save(llm, session, tmp_path / "d")
        later = restore(llm, tmp_path / "d", 3)
        torch.testing.assert_close(*(s.feed(torch.tensor([[3]])) for s in (session, later)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("plan", "stays"),
    [("snapkv:budget=20,window=4,kernel=3,every=4", True), ("adakv:budget=20,window=4,kernel=3,every=4", False)],
)
def test_a_captured_step_outlives_a_rescore_in_the_same_memory(plan, stays, llm_of):
    """Another `layout` makes a captured or recorded step stale. Where it stays, every tensor of the cache is the same
    object at the same address.
    """

    def tensors():
        return [(x, x.data_ptr()) for store in session.cache.stores.values() for x in store.tensors()]

    llm = llm_of("g3")
    session = llm.session(12, plan=parse(plan))
    session.start([text(60, seed=1)])
    session.cache.freeze()
    layout, before = session.cache.layout, tensors()
    session.feed(torch.tensor([[3]]))
    held = session.cache.stores[0].slots.cursor.clone()
    for t in range(4):
        session.feed(torch.tensor([[t]]))
    assert (session.cache.stores[0].slots.cursor < held + 4).any()  # it was rescored
    assert (session.cache.layout is layout) == stays
    if stays:
        assert all(a is b and m == n for (a, m), (b, n) in zip(before, tensors(), strict=True))


def test_random_draws_anew_when_it_looks_again(llm_of):
    session = llm_of("g3").session(200, None, parse("random:budget=40,window=4,every=8"))
    session.start([text(60, seed=5)])
    for _ in range(20):
        session.feed(torch.tensor([text(8, seed=6)]))
    held = session.cache.stores[0].unpack()[0].pos[0, 0].tolist()
    gaps = [b - a for a, b in itertools.pairwise(held[:-4])]
    assert len(set(gaps)) > 4 and max(gaps.count(g) for g in set(gaps)) < 30  # no comb
