"""Policies that weigh a token by what its value changes in the layer's output, against their rules as loops over lists."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from helpers import context_of, positions, shape

from nanokv import parse
from nanokv.cache.prefill import PromptCache

LAYERS, H, HKV, T = 3, 6, 2, 60


def compress(plan: str, chunk: int | None = None, seed: int = 0):
    """Random q, k, v (L,1,·,T,D) and output projections → (what each layer keeps, per layer attention (H,·,T) by the last `window`
    queries, the norms of the values)."""
    config, part, dice = shape(layers=LAYERS), parse(plan), torch.Generator().manual_seed(seed)
    plan = part.fit(config, torch.float32, T, 8)
    q, k, v = (torch.randn(LAYERS, 1, n, T, 16, generator=dice) * 1.5 for n in (H, HKV, HKV))
    v = v * (0.1 + torch.rand(LAYERS, 1, HKV, T, 1, generator=dice))
    w_o = [torch.randn(24, H * 16, generator=dice) for _ in range(LAYERS)]
    ctx = replace(context_of(config), output_weights=w_o)
    cache = PromptCache(plan, torch.arange(T), ctx)
    for a in range(0, T, chunk or T):
        part = slice(a, min(a + (chunk or T), T))
        for i, layer in enumerate(cache.layers):
            layer.attend(q[i, :, :, part], k[i, :, :, part], v[i, :, :, part], torch.arange(T)[None, part])
    window = plan.policy.window
    weights = [oracle.attention(q[i, 0, :, -window:], k[i, 0]) for i in range(LAYERS)]
    norms = [oracle.output_norms(v[i, 0], w_o[i], H) for i in range(LAYERS)]
    return [[positions(cache.kept[i], h) for h in range(HKV)] for i in range(LAYERS)], weights, norms


def mean_scores(weight: torch.Tensor, window: int) -> list[list[float]]:
    """SnapKV's mean scores with a kernel of 1: (H,window,T) → for each KV head a list."""
    groups = weight.unflatten(0, (HKV, -1)).mean((1, 2)).tolist()
    return [x[: T - window] + [0.0] * window for x in groups]


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize(
    ("budget", "window", "share", "epsilon"), [(20, 4, 0.5, 1e-4), (31, 1, 0.25, 0.1), (20, 4, 1, 0), (20, 4, 0, 0)]
)
def test_critical_chooses_half_by_attention_and_half_by_values(budget, window, share, epsilon, chunk):
    plan = f"critical:budget={budget},window={window},kernel=1,first={share},epsilon={epsilon}"
    kept, weights, norms = compress(plan, chunk)
    always, differs = list(range(T - window, T)), 0
    for i in range(LAYERS):
        for h, score in enumerate(mean_scores(weights[i], window)):
            assert kept[i][h] == oracle.critical(score, norms[i][h], budget, share, epsilon, always)
            differs += kept[i][h] != oracle.top(score, budget, always)
    assert (differs == 0) == (share == 1)  # values decide something


def test_criticals_heads_share_out_the_budget_by_attention_alone():
    kept, weights, norms = compress("critical:budget=20,window=4,kernel=1,heads=ada,floor=0.3")
    always = list(range(T - 4, T))
    for i in range(LAYERS):
        scores = mean_scores(weights[i], 4)
        sizes = [len(x) for x in oracle.ada(scores, 20, 0.3, always)]
        right = [oracle.critical(scores[h], norms[i][h], n, 0.5, 1e-4, always) for h, n in enumerate(sizes)]
        assert kept[i] == right and sum(sizes) == 40


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize(
    ("budget", "window", "kernel", "mass"), [(20, 4, 5, 0.9), (20, 4, 5, 0.3), (33, 2, 1, 0.6), (20, 4, 3, 0)]
)
def test_defensive_keeps_what_any_query_may_need(budget, window, kernel, mass, chunk):
    kept, weights, norms = compress(f"defensive:budget={budget},window={window},kernel={kernel},mass={mass}", chunk)
    for i in range(LAYERS):
        scores = oracle.defensive(weights[i], norms[i], budget, window, kernel, mass)
        assert kept[i] == oracle.ada(scores, budget, 0.0, list(range(T - window, T)))


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_heads_of_all_layers_may_compete(floor):
    kept, weights, norms = compress(f"defensive:budget=20,window=4,layers=compete,floor={floor},mass=0.3")
    scores = [x for i in range(LAYERS) for x in oracle.defensive(weights[i], norms[i], 20, 4, 5, 0.3)]
    right = oracle.ada(scores, 20, floor, list(range(T - 4, T)))
    assert [x for layer in kept for x in layer] == right
    assert len({sum(map(len, layer)) for layer in kept}) > 1  # layers get different numbers
    kept, weights, norms = compress("critical:budget=20,window=4,kernel=1,layers=compete,heads=ada")
    scores = [x for w in weights for x in mean_scores(w, 4)]
    sizes = [len(x) for x in oracle.ada(scores, 20, 0.2, list(range(T - 4, T)))]
    assert [len(x) for layer in kept for x in layer] == sizes and sum(sizes) == 20 * LAYERS * HKV


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("critical:select=chunk", "the second stage ranks single tokens"),
        ("critical:first=1.5", "first 0 … 1"),
        ("defensive:every=64", "use every=0"),
        ("defensive:select=chunk", "use select=token"),
        ("defensive:mass=2", "mass 0 … 1"),
        ("snapkv:layers=compete", "need heads=ada"),
        ("adakv:layers=compete,every=64", "looks at the prompt only"),
        ("h2o:layers=compete,heads=ada", "evicts at each token"),
        ("expected:epsilon=-1", "epsilon ≥ 0"),
    ],
)
def test_what_cannot_be_is_said(plan, says):
    with pytest.raises(ValueError, match=says):
        parse(plan)


def test_layers_of_different_lengths_spend_the_whole_budget():
    """A layer with a sliding window shows fewer tokens than its guaranteed share; the others get what that leaves."""
    config = replace(shape(layers=2, window=12), full_attention_layers=(1,))
    plan = parse("knorm:budget=20,heads=ada,layers=compete,floor=1").fit(config, torch.float32, T, 8)
    cache = PromptCache(plan, torch.arange(T), context_of(config))
    dice = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        layer.attend(*(torch.randn(1, n, T, 16, generator=dice) for n in (H, HKV, HKV)), torch.arange(T)[None])
    kept = [[len(positions(cache.kept[i], h)) for h in range(HKV)] for i in range(2)]
    assert kept[0] == [11, 11] and sum(kept[1]) == 20 * 2 * HKV - 22


def test_what_competes_may_also_be_demoted():
    for budget in (20, 80):
        config = shape()
        plan = parse(f"knorm:budget={budget},heads=ada,layers=compete,demote=true").fit(config, torch.float32, T, 8)
        cache = PromptCache(plan, torch.arange(T), context_of(config))
        for layer in cache.layers:
            layer.attend(*(torch.randn(1, n, T, 16) for n in (H, HKV, HKV)), torch.arange(T)[None])
        for kept in cache.kept.values():
            assert int(kept.length.sum() + kept.demoted.length.sum()) == T * HKV


def test_leverage_of_many_long_keys_in_few_dimensions_is_a_share():
    """16 dimensions in a projection to 48: without the fp64 solve the result is noise."""
    k = torch.randn(1, 2, 4000, 16, generator=torch.Generator().manual_seed(1)) * 300
    leverage = parse("compactor").policy._leverage(k)
    assert (leverage >= 0).all() and (leverage <= 1).all()
    torch.testing.assert_close(leverage.sum(-1), torch.full((1, 2), 16.0), atol=1e-3, rtol=1e-3)  # its rank
