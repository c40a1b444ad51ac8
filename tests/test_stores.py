"""Stores that round: every one under every policy and share, against the values it says it holds; its codes, its schedule, its bytes."""

from __future__ import annotations

import pytest
import torch
from conftest import text
from oracle import HeldCache
from test_identity import ROUND, SMALL, STEPS

from nanokv import parse
from nanokv.plan import Plan
from nanokv.policies import POLICIES
from nanokv.stores import STORES

# each registered store, small enough that groups fill and rings turn within 14 steps
TINY = {
    "dense": "dense",
    "ragged": "ragged",
    "int": "int:k=8,v=4,group=8,residual=4",
    "int8": "int8:group=4,residual=0",
    "int4": "int4:group=8,residual=8",
    "int2": "int2:group=4,residual=6,pin=3",
    "kivi4": "kivi4:group=4,residual=4,pin=2",
    "kivi2": "kivi2:group=2,residual=1",
    "fp8": "fp8:pin=2",
    "rot4": "rot4:block=8",
    "turbo": "turbo:k=4,v=3,pin=3",
    "mixed": "mixed",
}
ALL = {name: plans[0] for name, plans in (SMALL | ROUND).items()}
ERROR = {
    8: 1e-3,
    4: 0.03,
    3: 0.1,
    2: 0.5,
}  # relative mean squared error of what was rounded to so many bits, with room for tiny heads


def pairs() -> list[tuple[str, str]]:
    return [(keep, store) for keep in POLICIES for store in STORES]


def of(keep: str, store: str, share: dict | None = None) -> Plan:
    how = TINY[store] if keep != "keyformer" else TINY[store].replace("fp8:pin=2", "fp8").replace(",pin=3", "")
    part = parse(f"{ALL[keep].partition('+')[0]}+{how}")
    return Plan(part.keep, part.store, share or {}, part.names)


def run(llm, plan: Plan, prompt: list[int], more: list[int], chunk: int | None = None):
    """Teacher-forced: logits (1+STEPS,vocab), and {token: {layer: [(positions, K, V) per head]}} as each step's attention found them."""
    session, held = llm.session(STEPS, chunk, plan), {}
    logits = [session.start([prompt])]
    for t in range(STEPS):
        if session.cache is not None:
            watch(session, held)
        logits.append(session.feed(torch.tensor([[more[t]]])))
    return torch.cat(logits), held, session


def watch(session, held: dict) -> None:
    cache = session.cache
    upkeep = type(cache).maintain.__get__(cache)

    def maintain(written: int, seen: list[int]) -> None:
        held[seen[0] - 1] = {i: values(store) for i, store in cache.stores.items()}
        upkeep(written, seen)

    cache.maintain = maintain


def values(store, row: int = 0) -> list[tuple]:
    """Per head (positions, K, V), ascending, of all sets the store holds."""
    heads = []
    parts = store.unpack()[row].parts
    for h in range(parts[0].k.shape[1]):
        pos, k, v = (torch.cat([getattr(p, f)[0, h, : p.length[0, h]] for p in parts]) for f in ("pos", "k", "v"))
        order = pos.argsort()
        heads.append((pos[order], k[order], v[order]))
    return heads


@pytest.mark.parametrize("share", [{}, {2: 0}], ids=["own", "shared"])
@pytest.mark.parametrize(("keep", "store"), pairs())
def test_every_pair_runs_or_refuses_and_only_rounding_differs(keep, store, share, llm_of):
    """Against attention over what the store unpacks, so that folding scales, turning queries, rings and merging are exact; what it unpacks
    against the keys and values that the model made."""
    if why := STORES[store].refuses(POLICIES[keep]):
        with pytest.raises(ValueError, match="use one of"):
            of(keep, store)
        assert "\n" not in why
        return
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    plan = of(keep, store, share)
    logits, held, _ = run(llm, plan, prompt, more)
    cache = HeldCache(llm.config, held, 60, share)
    model, ids = llm.models.prefill, torch.tensor([prompt + more])
    with torch.no_grad():
        expected = model.logits(model.hidden(ids, torch.arange(60 + STEPS)[None], cache))[0, 59:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    off, size = [0.0, 0.0], [0.0, 0.0]
    for layers in held.values():
        for layer, heads in layers.items():
            for h, (pos, *kept) in enumerate(heads):
                for i, x in enumerate(kept):
                    right = cache.true[layer][i][h, pos.long()]
                    off[i] += (x - right).pow(2).sum().item()
                    size[i] += right.pow(2).sum().item()
    fields = vars(plan.store)
    bits = {"fp8": (8, 8), "rot4": (4, 4), "mixed": (fields.get("low"),) * 2}.get(
        store, (fields.get("k"), fields.get("v"))
    )
    for wrong, all_of_it, b in zip(off, size, bits, strict=True):
        assert wrong / all_of_it < (1e-9 if b is None else ERROR[b])
        assert b is None or wrong > 0


LATE = [
    name
    for name, part in POLICIES.items()
    if part.watches or part.every or part.once or name in ("corm", "scissorhands")
]


@pytest.mark.parametrize("store", [n for n in STORES if n not in ("dense", "ragged", "mixed")])
@pytest.mark.parametrize("keep", [n for n in SMALL if n not in LATE])
def test_a_policy_that_decides_at_the_prompt_keeps_the_same_tokens_in_every_store(keep, store, llm_of):
    if STORES[store].refuses(POLICIES[keep]):
        pytest.skip("does not run")
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    (_, held, _), (_, right, _) = (run(llm, of(keep, s), prompt, more) for s in (store, "dense"))
    for token, layers in held.items():
        for layer, heads in layers.items():
            for mine, theirs in zip(heads, right[token][layer], strict=True):
                assert torch.equal(mine[0], theirs[0])
