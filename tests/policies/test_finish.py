"""Values that change when tokens are evicted: merged into their neighbours, or refitted; against loops and normal equations."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from helpers import context_of, positions, shape
from tiny import text

from nanokv import parse
from nanokv.cache.prefill import PromptCache

H, HKV, T, DIM = 6, 2, 60, 16


def compress(plan: str, dtype=torch.float32, chunk: int | None = None):
    """Random q, k, v of one layer → (what it keeps, q (H,T,D), k and v (Hkv,T,D))."""
    config, dice = shape(H, HKV, layers=1), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, T, DIM, generator=dice).to(dtype) for n in (H, HKV, HKV))
    cache = PromptCache(parse(plan).fit(config, dtype, T, 8), torch.arange(T), context_of(config))
    for a in range(0, T, chunk or T):
        b = min(T, a + (chunk or T))
        cache.layers[0].attend(*(x[:, :, a:b] for x in (q, k, v)), torch.arange(a, b)[None])
    return cache.kept[0], q[0], k[0], v[0]


PLANS = ["keydiff:budget=20", "snapkv:budget=20,window=4,kernel=3,heads=ada", "h2o:budget=24", "knorm:budget=1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_merged_values_are_those_of_the_loop(plan, dtype, monkeypatch):
    monkeypatch.setattr("nanokv.policies.finish.SIMILARITY_BLOCK", 17)
    kept, _, k, v = compress(f"{plan},merge=nearest", dtype)
    plain = compress(plan, dtype)[0]
    assert torch.equal(kept.pos, plain.pos) and torch.equal(kept.k, plain.k)
    for h in range(HKV):
        mine = positions(kept, h)
        right = oracle.merged(k[h], v[h], mine)
        rtol = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(kept.v[0, h, : len(mine)], right.to(dtype), rtol=rtol, atol=1e-5)
        assert not torch.equal(kept.v[0, h, : len(mine)], plain.v[0, h, : len(mine)])


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("plan", PLANS)
def test_refitted_values_solve_the_normal_equations(plan, chunk):
    kept, q, k, v = compress(f"{plan},refit=lsq", chunk=chunk)
    for h in range(HKV):
        mine = positions(kept, h)
        right = oracle.refitted(q[3 * h : 3 * h + 3, -32:], k[h], v[h], mine, 0.01)
        torch.testing.assert_close(kept.v[0, h, : len(mine)].double(), right, rtol=1e-3, atol=1e-4)


def test_refitted_values_bring_the_observation_queries_nearer_to_their_outputs():
    errors = {}
    for refit in ("none", "lsq"):
        kept, q, k, v = compress(f"keydiff:budget=20,refit={refit}")
        total = 0.0
        for h in range(H):
            mine = positions(kept, h // 3)
            weight = (q[h, -1] @ k[h // 3].T / DIM**0.5).softmax(-1) @ v[h // 3]
            now = (q[h, -1] @ k[h // 3][mine].T / DIM**0.5).softmax(-1) @ kept.v[0, h // 3, : len(mine)]
            total += float((weight - now).square().sum())
        errors[refit] = total
    assert errors["lsq"] < 0.1 * errors["none"], errors


def test_windows_shared_layers_and_stores_take_changed_values(llm_of):
    for model in ("windows", "g3"):
        for plan in ("snapkv:budget=20,window=4,merge=nearest,refit=lsq+int8", "adakv:budget=20,window=4,refit=lsq"):
            shared = replace(parse(plan), share={2: 1} if model == "g3" else {})
            session = llm_of(model).session(4, 16, shared)
            logits = session.start([text(60, seed=5)])
            assert logits.isfinite().all() and session.feed(torch.tensor([[5]])).isfinite().all()


def test_what_cannot_be_changed_is_refused():
    for plan in ("snapkv:merge=nearest,every=64", "h2o:demote=true,refit=lsq"):
        with pytest.raises(ValueError, match="values are changed once"):
            parse(plan)
    with pytest.raises(ValueError, match="use no merge= or refit="):
        parse("scissorhands:refit=lsq")
    with pytest.raises(ValueError, match="refit=lstsq is unknown; refit is none or lsq"):
        parse("snapkv:refit=lstsq")
