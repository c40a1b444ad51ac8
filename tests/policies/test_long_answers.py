"""Policies for long answers, R-KV and TriAttention, against their formulas as loops: after a prompt, and again while decoding."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import compress, mine, positions, shape, stepped

from nanokv.model.rope import inverse_frequencies, unrotated

T = 60


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize(
    ("budget", "window", "kernel", "mix", "similar"),
    [(20, 4, 3, 0.5, 0.2), (31, 1, 1, 0.07, 0.5), (9, 8, 7, 0.0, 0.0), (20, 4, 3, 1.0, 0.5)],
)
def test_rkv_weighs_importance_against_redundancy(budget, window, kernel, mix, similar, chunk, monkeypatch):
    monkeypatch.setattr("nanokv.policies.rkv.KEYS_AT_ONCE", 17)
    plan = f"rkv:budget={budget},window={window},kernel={kernel},mix={mix},similar={similar},every=0"
    kept, q, k = compress(plan, shape(), T, 1, chunk)
    for layer in range(3):
        weight = oracle.attention(q[layer][:, -window:], k[layer])
        for h in range(2):
            score = oracle.rkv(mine(weight, h), k[layer][h], window, kernel, mix, similar)
            assert positions(kept[layer], h) == oracle.top(score, budget)


def test_rkv_scores_what_it_holds_again_while_decoding():
    seen, q, k, _ = stepped("rkv:budget=20,window=4,kernel=3,mix=0.5,similar=0.2,every=6", T, 14)
    for layer in range(2):
        for h in range(2):
            before, after = seen[5][layer][h], sorted(set(seen[6][layer][h]) - {T + 6})
            held = k[layer][h][before]
            weight = oracle.attention(mine(q[layer], h)[:, T + 2 : T + 6], held[None])
            score = oracle.rkv(weight, held, 4, 3, 0.5, 0.2)
            assert len(before) == 26 and after == [before[n] for n in oracle.top(score, 20)]


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize(("recent", "far"), [(4, 100), (0, 1), (12, 65536)])
def test_triattention_is_the_sum_over_complex_pairs(recent, far, chunk):
    kept, q, k = compress(f"triattention:budget=20,recent={recent},far={far},every=0", shape(), T, 2, chunk)
    inv = inverse_frequencies(shape())
    for layer in range(3):
        raw = unrotated(q[layer][None], torch.arange(T)[None], inv)[0]
        for h in range(2):
            score = oracle.triattention(mine(raw, h), k[layer][h], inv, recent, far)
            assert positions(kept[layer], h) == oracle.top(score, 20)


def test_triattention_looks_again_by_the_queries_since_the_prompt():
    seen, q, k, _ = stepped("triattention:budget=20,recent=3,far=64,every=128", T, 130)
    inv, now = inverse_frequencies(shape()), torch.arange(T, T + 128)[None]
    for layer in range(2):
        raw = unrotated(q[layer][None, :, T : T + 128], now, inv)[0]
        for h in range(2):
            before, after = seen[127][layer][h], sorted(set(seen[128][layer][h]) - {T + 128})
            score = oracle.triattention(mine(raw, h), k[layer][h][before], inv, 3, 64, before, T + 128)
            assert after == [before[n] for n in oracle.top(score, 20)]
