"""Every policy against the oracle that covers positions, RoPE, GQA mapping and slots at once: a full cache with a mask."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from helpers import PLANS, STEPS, compress, every, first, masked, one_each, run, shape
from tiny import text

from nanokv import parse
from nanokv.cache.plan import Plan
from nanokv.policies import EXAMPLES, POLICIES
from nanokv.policies.scorer import EvictingScorer, Scorer


@pytest.mark.parametrize("model", first(1, ["windows", "g3", "llama2"]))
@pytest.mark.parametrize("plan", one_each(PLANS))
def test_decode_equals_a_full_cache_with_a_mask(plan, model, llm_of):
    llm, prompt, more = llm_of(model), text(60, seed=5), text(STEPS, seed=6)
    logits, held = run(llm, plan, [prompt], [more])
    expected = masked(llm, prompt + more, 60, held[0])
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", every(4, PLANS))
def test_a_ragged_batch_equals_each_row_alone(plan, llm_of):
    llm = llm_of("g3")
    prompts, more = [text(60, seed=5), text(43, seed=7), text(7, seed=8)], [text(STEPS, seed=s) for s in (6, 9, 10)]
    together, _ = run(llm, plan, prompts, more)
    for row, (prompt, rest) in enumerate(zip(prompts, more, strict=True)):
        alone, held = run(llm, plan, [prompt], [rest])
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
        expected = masked(llm, prompt + rest, len(prompt), held[0])
        torch.testing.assert_close(together[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", first(1, [("windows", 16), ("g3", 1), ("g3", 59), ("mistral", 16)]))
@pytest.mark.parametrize("plan", every(3, PLANS))
def test_chunks_equal_the_whole_prompt(plan, way, llm_of):
    model, chunk = way
    llm, prompt, more = llm_of(model), text(60, seed=5), text(STEPS, seed=6)
    whole, held = run(llm, plan, [prompt], [more])
    parts, again = run(llm, plan, [prompt], [more], chunk)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    assert held == again


@pytest.mark.parametrize("plan", one_each(PLANS))
def test_the_first_token_is_that_of_the_full_cache(plan, llm_of):
    llm, prompt = llm_of("g3"), text(60, seed=5)
    full, first = (llm.session(4, None, parse(p)).start([prompt]) for p in ("full", plan))
    assert torch.equal(full, first)


def test_the_released_simlayer_decides_after_the_second_token(llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    full, _ = run(llm, "full", [prompt], [more])
    late, held = run(llm, "simlayer:variant=decode,threshold=0,sink=2,recent=16", [prompt], [more])
    torch.testing.assert_close(late[0, :2], full[0, :2], atol=1e-5, rtol=1e-5)
    assert (late[0, 2] - full[0, 2]).abs().max() > 1e-4
    assert held[0][61][0][0] == [0, 1, *range(45, 62)]  # the first generated token is among the recent


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_as_large_as_the_prompt_changes_nothing(name, llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    full, _ = run(llm, "full", [prompt], [more])
    same, _ = run(llm, EXAMPLES[name].whole, [prompt], [more])
    apart = POLICIES[name].decode_request or POLICIES[name].default_store != "dense"  # another order of sums
    torch.testing.assert_close(full, same, atol=2e-5 if apart else 0, rtol=0)


@pytest.mark.parametrize("plan", every(3, PLANS))
@pytest.mark.parametrize("n", first(1, [1, 3]))
def test_prompts_shorter_than_window_or_sinks_work(plan, n, llm_of):
    llm, prompt, more = llm_of("g3"), text(n, seed=11), text(STEPS, seed=12)
    logits, held = run(llm, plan, [prompt], [more])
    expected = masked(llm, prompt + more, n, held[0])
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", one_each(PLANS))
def test_twice_in_a_row_is_the_same(plan, llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    first, second = run(llm, plan, [prompt], [more])[0], run(llm, plan, [prompt], [more])[0]
    assert torch.equal(first, second)


def test_every_policy_has_examples_of_its_own():
    assert set(EXAMPLES) == set(POLICIES)
    for name, examples in EXAMPLES.items():
        assert {parse(plan).names[0] for plan in (*examples.small, examples.whole)} == {name}


@pytest.mark.parametrize("name", [n for n, p in POLICIES.items() if isinstance(p, Scorer)])
def test_tokens_that_must_stay_fit_the_smallest_budget(name, monkeypatch):
    """A score of infinity keeps a token in any case, so a policy's least budget must hold all of them."""
    part = parse(EXAMPLES[name].small[0])
    policy = replace(part.policy, budget=max(1, part.policy.min_budget, part.policy.every + 1))
    original, counts = type(policy).score, []

    def noted(self, p):
        score = original(self, p)
        counts.append(int((score == torch.inf).sum(-1).max()))
        return score

    monkeypatch.setattr(type(policy), "score", noted)
    compress(replace(part, policy=policy), shape(), 60)
    assert counts and max(counts) <= policy.budget


def test_the_oracle_notices_one_wrong_token(llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    logits, held = run(llm, "snapkv:budget=20,window=4,kernel=3", [prompt], [more])
    for layers in held[0].values():
        mine = layers[1][0]
        mine[0] = min(set(range(50)) - set(mine))
    assert (logits[0] - masked(llm, prompt + more, 60, held[0])).abs().max() > 1e-3


SCORERS = [n for n, p in POLICIES.items() if isinstance(p, Scorer) and not p.demotes and type(p)() == p]
SPLITS = first(
    2,
    [
        "layers=squeeze,heads=ada",
        "heads=ada,every=9",
        "select=chunk,chunk=4",
        "heads=ada",
        "layers=pyramid",
        "layers=squeeze",
    ],
)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_takes_every_split_of_its_budget(name, split, llm_of):
    example = EXAMPLES[name].small[0]
    part = parse(example).policy
    # an evicting policy never rescores, and others not before the queries of a whole window have come
    never = isinstance(part, EvictingScorer) or (not part.decode_request and part.request.buffered_queries > 9)
    if "every" in split:  # an option may be given once
        example = re.sub(r",every=\d+", "", example)
    refuses = {
        "scissorhands": ("squeeze",),  # it rescores
        "tova": ("ada",),
        "critical": ("chunk",),
        "defensive": ("every", "chunk"),
        "compactor": ("every",),
        "kvzip": ("every",),
    }
    if (never and "every" in split) or any(x in split for x in refuses.get(name, ())):
        with pytest.raises(
            ValueError, match=r"leave it out|use heads=flat|too often|use layers=flat|use select|use every"
        ):
            parse(f"{example},{split}")
        return
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    plan = parse(f"{example},{split}")
    logits, held = run(llm, plan, [prompt], [more])
    torch.testing.assert_close(logits[0], masked(llm, prompt + more, 60, held[0]), atol=1e-4, rtol=1e-4)
    left = plan.policy.rescore_every if name == "scissorhands" else 0  # it keeps fewer, to have room
    counts = [[len(p) - 1 for p in layer] for layer in held[0][60].values()]  # the first step's own token left out
    if not isinstance(plan.policy, EvictingScorer):
        assert sum(map(sum, counts)) == 3 * 2 * (plan.policy.budget - left)
    assert (len({sum(c) for c in counts}) > 1) == (plan.policy.layers != "flat")  # layers differ
    differ, may_differ = any(len(set(c)) > 1 for c in counts), plan.policy.heads == "ada"  # heads of a layer
    # where both hold, heads may come out alike, and so if the tokens that `defensive` takes first fill a small budget
    assert differ == may_differ or (not differ and (split == "layers=squeeze,heads=ada" or name == "defensive"))


SHARED = [
    "full",
    "snapkv:budget=20,window=4",
    "streaming:sink=2,recent=10",
    "h2o:budget=20",
    "tova:budget=20",
    "expected:budget=20",
]
SHARED += ["snapkv:budget=20,window=4,every=5", "adakv:budget=20,window=4,every=6", "corm:window=6,recent=8,every=4"]


@pytest.mark.parametrize("plan", SHARED)
def test_shared_layers_equal_a_full_cache_with_substituted_keys_and_a_mask(plan, llm_of):
    """The model computes every layer's keys and values for the oracle, which throws the readers' away."""
    llm, prompt, more, part = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6), parse(plan)
    logits, held = run(llm, Plan(part.policy, part.store, {2: 0}, part.names), [prompt], [more])
    assert sorted(held[0][61]) == [0, 1]
    torch.testing.assert_close(logits[0], masked(llm, prompt + more, 60, held[0], {2: 0}), atol=1e-4, rtol=1e-4)
