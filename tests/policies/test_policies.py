"""What each policy keeps, against the papers' rules as loops over lists. Random queries and keys, no model."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import compress, context_of, positions, shape

from nanokv import parse
from nanokv.backends.torch_ops import EAGER
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache
from nanokv.policies import EXAMPLES, POLICIES


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (2, 2)])
@pytest.mark.parametrize(("budget", "window", "kernel"), [(20, 6, 5), (33, 8, 7), (9, 8, 1), (40, 1, 13), (8, 8, 3)])
def test_snapkv_keeps_what_the_papers_steps_keep(pool, group, heads, kv_heads, budget, window, kernel):
    config = shape(heads, kv_heads)
    plan = f"snapkv:budget={budget},window={window},kernel={kernel},pool={pool},group={group}"
    kept, q, k = compress(plan, config, 57)
    for i in range(3):
        weight = oracle.attention(q[i, :, -window:], k[i])
        for h in range(kv_heads):
            mine = weight.unflatten(0, (kv_heads, -1))[h]
            assert positions(kept[i], h) == oracle.snapkv(mine, budget, window, kernel, pool, group)


@pytest.mark.parametrize("T", [7, 8, 9, 19, 20, 21])
def test_snapkv_at_the_borders_of_window_and_budget(T):
    kept, q, k = compress("snapkv:budget=20,window=8,kernel=5", shape(), T)
    weight = oracle.attention(q[0, :, -min(8, T) :], k[0]).unflatten(0, (2, -1))[1]
    assert positions(kept[0], 1) == (oracle.snapkv(weight, 20, 8, 5, "max") if T > 20 else list(range(T)))


def test_snapkv_keeps_a_needle_and_its_neighbours():
    config, T = shape(layers=1), 80
    plan = parse("snapkv:budget=20,window=4,kernel=5,pool=max").fit(config, torch.float32, T, 8)
    dice = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, T, 16, generator=dice) for n in (6, 2, 2))
    k[0, :, 30] = 9 * torch.nn.functional.normalize(q[0, :, -4:].unflatten(0, (2, 3)).sum((1, 2)), dim=-1)
    cache = PromptCache(plan, torch.arange(T), context_of(config))
    cache.layers[0].attend(q, k, v, torch.arange(T)[None])
    for h in range(2):
        assert {28, 29, 30, 31, 32, 76, 77, 78, 79} <= set(positions(cache.kept[0], h))


def test_kept_rows_are_those_of_the_prompt():
    kept, _, k = compress("snapkv:budget=20,window=4,kernel=3", shape(), 57)
    for h in range(2):
        assert torch.equal(kept[1].k[0, h], k[1][h, positions(kept[1], h)])


def test_streaming_keeps_sinks_and_recent():
    for T in (1, 3, 11, 12, 13, 50):
        kept, _, _ = compress("streaming:sink=2,recent=10", shape(), T)
        assert positions(kept[2], 0) == oracle.streaming(T, 2, 10)


def test_random_keeps_its_window_and_as_many_as_it_may():
    kept, _, _ = compress("random:budget=20,window=4", shape(), 57)
    for layer in range(3):
        for h in range(2):
            held = positions(kept[layer], h)
            assert len(held) == len(set(held)) == 20 and held == sorted(held) and held[-4:] == [53, 54, 55, 56]
    assert positions(kept[0], 0) != positions(kept[1], 0)
    other, _, _ = compress("random:budget=20,window=4,seed=1", shape(), 57)
    assert positions(other[0], 0) != positions(kept[0], 0)


@pytest.mark.parametrize("variant", ["prefill", "decode"])
def test_simlayer_trims_exactly_the_layers_above_the_threshold(variant):
    config, window = shape(layers=8), {"prefill": 6, "decode": 1}[variant]
    base = f"simlayer:variant={variant},sink=2,recent=20,window={window},threshold="
    whole, q, k = compress(base + "1", config, 60)
    n = 60 + (variant == "decode")
    scores = [oracle.laziness(oracle.attention(q[i, :, -window:], k[i]), 2, 20) for i in range(8)]
    assert all(len(positions(whole[i], 0)) == n for i in range(8))
    assert [whole[i].layer_score for i in range(8)] == pytest.approx(scores, abs=1e-5)
    middle = sorted(scores)[3]
    kept, _, _ = compress(f"{base}{middle + 1e-4}", config, 60)
    lazy = [i for i in range(8) if scores[i] > middle + 1e-4]
    assert len(lazy) == 4
    for i in range(8):
        assert positions(kept[i], 1) == (oracle.streaming(n, 2, 20) if i in lazy else list(range(n)))
        assert kept[i].limit[0, 0] == (22 if i in lazy and variant == "prefill" else -1)


def test_lighttransfer_keeps_the_least_lazy_layers_whole():
    config = shape(layers=8)
    plan = "simlayer:variant=light,sink=2,recent=20,window=6,full="
    kept, q, k = compress(plan + "3", config, 60)
    scores = [oracle.laziness(oracle.attention(q[i, :, -6:], k[i]), 2, 20) for i in range(8)]
    least = sorted(range(8), key=lambda i: scores[i])[:3]
    assert [i for i in range(8) if len(positions(kept[i], 0)) == 60] == sorted(least)
    half, _, _ = compress(plan + "50%", config, 60)
    assert sum(len(positions(half[i], 0)) == 60 for i in range(8)) == 4


def test_simlayer_leaves_prompts_within_sinks_and_recent_alone():
    for T, whole in ((21, True), (22, True), (23, False)):
        kept, _, _ = compress("simlayer:threshold=0,sink=2,recent=20,window=6", shape(), T)
        assert (len(positions(kept[0], 0)) == T) == whole


def test_readers_of_a_shared_layer_vote_together():
    config, window = shape(), 6
    plan = parse(f"snapkv:budget=20,window={window},kernel=3")
    shared = Plan(plan.policy, plan.store, {2: 0}, plan.names)
    kept, q, k = compress(shared, config, 57)
    assert sorted(kept) == [0, 1]
    both = oracle.attention(q[0, :, -window:], k[0]) + oracle.attention(q[2, :, -window:], k[0])
    mine = both.unflatten(0, (2, -1))[1]
    assert positions(kept[0], 1) == oracle.snapkv(mine, 20, window, 3, "max")
    lazy, q, k = compress(
        Plan(parse("simlayer:threshold=0.99,window=6,sink=2,recent=20").policy, plan.store, {2: 0}), config, 57
    )
    scores = [oracle.laziness(oracle.attention(q[i, :, -6:], k[0]), 2, 20) for i in (0, 2)]
    assert lazy[0].layer_score == pytest.approx(min(scores), abs=1e-5)


def test_the_models_window_hides_old_tokens_from_every_policy():
    config = shape(window=24)
    for name in POLICIES:
        if POLICIES[name].positions_by_chunk:
            with pytest.raises(ValueError, match="sliding window"):
                compress(EXAMPLES[name].small[0], config, 57)
            continue
        kept, _, _ = compress(EXAMPLES[name].small[0], config, 57)
        for layer in range(3):
            assert min(positions(kept[layer], 0)) >= 57 - 24 + 1


@pytest.mark.parametrize("chunk", [5, 50])
def test_a_window_longer_than_the_last_chunk_is_gathered_over_chunks(chunk):
    plan = "snapkv:budget=20,window=12,kernel=3"
    whole, parts = compress(plan, shape(), 57)[0], compress(plan, shape(), 57, chunk=chunk)[0]
    assert all(torch.equal(whole[i].pos, parts[i].pos) for i in range(3))


def test_votes_of_all_queries_add_up_to_their_number():
    q, k = torch.randn(1, 6, 40, 16), torch.randn(1, 2, 40, 16)
    votes = EAGER.attention_scores(q, k, 0, None, "mean")
    torch.testing.assert_close(votes.sum(-1), torch.full((1, 2), 40.0))
    weight = oracle.attention(q[0], k[0]).unflatten(0, (2, 3))
    torch.testing.assert_close(votes[0].double(), weight.mean(1).sum(1), atol=1e-4, rtol=1e-4)
    late = EAGER.attention_scores(q[:, :, -7:], k, 33, 10, "max")
    weight = oracle.attention(q[0, :, -7:], k[0], window=10).unflatten(0, (2, 3))
    torch.testing.assert_close(late[0].double(), weight.sum(2).amax(1), atol=1e-4, rtol=1e-4)
