"""What tests of several folders use: plans at work, tiny contexts, checkpoints to damage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import MaskedCache
from safetensors.torch import load_file, save_file
from tiny import TINY

from nanokv import parse
from nanokv.backends import EAGER, SDPA
from nanokv.cache.context import Context
from nanokv.cache.decode import KVCache
from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache
from nanokv.model.config import ModelConfig
from nanokv.model.rope import inverse_frequencies
from nanokv.policies import EXAMPLES, POLICIES
from nanokv.stores import EXAMPLES as STORE_EXAMPLES
from nanokv.stores import STORES

ROOT = Path(__file__).parent.parent


def first(n: int, values: Iterable) -> list:
    """Values for a parametrized test: the first n run in `make test`, the others with `pytest -m exhaustive`."""
    return [x if i < n else pytest.param(x, marks=pytest.mark.exhaustive) for i, x in enumerate(values)]


def every(n: int, values: Iterable) -> list:
    """Values for a parametrized test: every n-th runs in `make test`, the others with `pytest -m exhaustive`."""
    return [x if i % n == 0 else pytest.param(x, marks=pytest.mark.exhaustive) for i, x in enumerate(values)]


def one_each(plans: list[str]) -> list:
    """Plans for a parametrized test: the first of each policy runs in `make test`, the others with `pytest -m exhaustive`."""
    names = [re.split(r"[:+]", plan)[0] for plan in plans]
    marks = [() if name not in names[:i] else pytest.mark.exhaustive for i, name in enumerate(names)]
    return [pytest.param(plan, marks=mark) for plan, mark in zip(plans, marks, strict=True)]


# of the policies that need no store that rounds and leave positions as they are; for the others see
# tests/stores/test_stores.py and tests/policies/test_positions.py
PLANS = [
    plan
    for name, examples in EXAMPLES.items()
    if not POLICIES[name].demotes and not POLICIES[name].positions_by_chunk
    for plan in examples.small
]
STEPS = 14
FIELDS = ModelConfig.__dataclass_fields__


# ---- a plan at work ----


def run(llm, plan: str | Plan, prompts: list[list[int]], more: list[list[int]], chunk: int | None = None):
    """Teacher-forced: logits (rows, 1+STEPS, vocab), and what each step saw: {row: {token: {layer: [set of positions per head]}}}."""
    plan = parse(plan) if isinstance(plan, str) else plan
    session, held = llm.session(STEPS, chunk, plan), [{} for _ in prompts]
    logits = [session.start(prompts)]
    for t in range(STEPS):
        waits = session.cache is None
        if not waits:
            note(session, held, t)
        logits.append(session.feed(torch.tensor([[m[t]] for m in more])))
    return torch.stack(logits, 1), held


def note(session, held: list[dict], t: int) -> None:
    """Look at what is held between a step's attention and the upkeep after it, when a policy may look again."""
    cache = session.cache
    upkeep = type(cache).maintain.__get__(cache)

    def maintain(written: int, seen: list[int], tokens) -> None:
        for row, n in enumerate(seen):
            held[row][n - 1] = held_positions(cache, row)
        upkeep(written, seen, tokens)

    cache.maintain = maintain


def held_positions(cache, row: int) -> dict[int, list[list[int]]]:
    """owner → per KV head the positions held, ascending."""
    found = {}
    for i, store in cache.stores.items():
        kept = store.unpack()[row]
        found[i] = [p[:n].tolist() for p, n in zip(kept.pos[0], kept.length[0], strict=True)]
    return found


def masked(llm, ids: list[int], T: int, held: dict, share: dict | None = None) -> torch.Tensor:
    """The same logits by the oracle: queries of the prompt see all, each later one what was held at its step (see `run`)."""

    def seen(layer: int, head: int, i: int, j: int) -> bool:
        return i not in held or j in held[i][layer][head]  # a waiting policy still shows its first token everything

    cache = MaskedCache(llm.config, seen, share)
    pos = torch.arange(len(ids))[None]
    model = llm.models.prefill
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([ids]), pos, cache))[0, T - 1 :]


def pairs() -> list[tuple[str, str]]:
    """Every policy with every store but those on the host, which hold dense slots: tests/stores/test_chunked.py compares their bits."""
    return [(keep, store) for keep in POLICIES for store in STORES if store in STORE_EXAMPLES]


def of(keep: str, store: str, share: dict | None = None) -> Plan:
    how = STORE_EXAMPLES[store]
    if POLICIES[keep].eviction == "score":  # it may let the first tokens go: see the refusals below
        how = how.replace("fp8:pin=2", "fp8").replace("rot8:pin=2", "rot8").replace(",pin=3", "")
    part = parse(f"{EXAMPLES[keep].small[0].partition('+')[0]}+{how}")
    return Plan(part.policy, part.store, share or {}, part.names)


# ---- a policy at work on random keys ----


def shape(heads: int = 6, kv_heads: int = 2, layers: int = 3, window: int | None = None) -> ModelConfig:
    values = {k: v for k, v in TINY.items() if k in FIELDS and k not in ("eos_token_id",)}
    values |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    return ModelConfig(**{**values, "head_dim": 16, "sliding_window": window})


def context_of(config: ModelConfig) -> Context:
    return Context(config, EAGER, torch.device("cpu"), torch.float32, inverse_frequencies(config))


def compress(plan: Plan | str, config: ModelConfig, T: int, seed: int = 0, chunk: int | None = None):
    """Run random q, k, v through a PromptCache → (kept per layer, q per layer (H,T,D), k per layer (Hkv,T,D))."""
    plan = (parse(plan) if isinstance(plan, str) else plan).fit(config, torch.float32, T, 8)
    dice = torch.Generator().manual_seed(seed)
    H, Hkv, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    weights = torch.randn(L, 24, H * 16, generator=torch.Generator().manual_seed(seed + 1))
    cache = PromptCache(plan, torch.arange(T), replace(context_of(config), output_weights=weights))
    for i, layer in enumerate(cache.layers):  # there is no residual stream
        layer.similarity_sum, layer.compared = float(i), 1
    q, k, v = (torch.randn(L, 1, n, T + plan.policy.decide_after, 16, generator=dice) * 1.5 for n in (H, Hkv, Hkv))
    for a in range(0, T, chunk or T):
        b = min(a + (chunk or T), T)
        for i, layer in enumerate(cache.layers):
            kv = (k[i, :, :, a:b], v[i, :, :, a:b]) if layer.owns else (None, None)
            layer.attend(q[i, :, :, a:b], *kv, torch.arange(a, b)[None])
    for t in range(T, T + plan.policy.decide_after):
        for i, layer in enumerate(cache.layers):
            layer.attend(q[i, :, :, t : t + 1], k[i, :, :, t : t + 1], v[i, :, :, t : t + 1], torch.tensor([[t]]))
    for p in range(cache.n_passes):
        n = len(plan.policy.replay(cache.ids, p, lambda text: cache.ids[:0]))
        cache.begin_pass(n, plan.policy.scored(T, p))
        again = [torch.randn(L, 1, heads, n, 16, generator=dice) for heads in (H, Hkv, Hkv)]
        for i, layer in enumerate(cache.layers):
            layer.attend(*(x[i] for x in again), torch.arange(T, T + n)[None])
    return cache.kept, q[:, 0], k[:, 0]


def positions(kept, head: int) -> list[int]:
    return kept.pos[0, head, : kept.length[0, head]].tolist()


def stepped(text: str, T: int, steps: int = 200, share: dict | None = None, seed: int = 0):
    """Random q, k, v through prompt and steps → ([step][layer][head]: positions held when it attends, q (L,H,·,D), k, the cache)."""
    config, part = shape(layers=3 if share else 2), parse(text)
    plan = Plan(part.policy, part.store, share or {}, part.names).fit(config, torch.float32, T, steps)
    dice, L = torch.Generator().manual_seed(seed), config.num_hidden_layers
    q, k, v = (torch.randn(L, 1, n, T + steps, 16, generator=dice) * 1.5 for n in (6, 2, 2))
    ctx = context_of(config)
    first = PromptCache(plan, torch.arange(T), ctx)

    def attend(cache, a: int, b: int) -> None:
        for i, layer in enumerate(cache.layers):
            kv = (k[i, :, :, a:b], v[i, :, :, a:b]) if layer.owns else (None, None)
            layer.attend(q[i, :, :, a:b], *kv, torch.arange(a, b)[None])

    attend(first, 0, T)
    cache, seen = KVCache.pack([plan], [first.kept], steps, ctx), []
    for t in range(T, T + steps):
        cache.room -= 1
        attend(cache, t, t + 1)
        seen.append({i: [positions(x, h) for h in range(2)] for i, s in cache.stores.items() for x in s.unpack()})
        cache.maintain(1, [t + 1])
    return seen, q[:, 0], k[:, 0], cache


def mine(q: torch.Tensor, h: int) -> torch.Tensor:
    """The query heads of KV head h: (6,·,D) → (3,·,D)."""
    return q[3 * h : 3 * h + 3]


# ---- a store without a model ----


class Shape:
    """What a store reads of a model's configuration."""

    def __init__(self, dim: int, heads: int = 2):
        self.head_dim, self.num_key_value_heads = dim, heads


def context(dim: int, heads: int = 2) -> Context:
    return Context(Shape(dim, heads), SDPA, torch.device("cpu"), torch.float32, torch.ones(dim // 2))


def kept(k: torch.Tensor, v: torch.Tensor) -> Kept:
    _, heads, n, _ = k.shape
    pos = torch.arange(n, dtype=torch.int32).expand(1, heads, n)
    length = torch.full((1, heads), n, dtype=torch.int32)
    return Kept(k, v, pos, length, length * 0 - 1, length * 0)


def storages(thing, seen: dict[int, int], stop: tuple) -> int:
    """Bytes of every tensor storage that an object reaches, each once; what `stop` holds is not the cache's."""
    todo, met = [thing], set()
    while todo:
        x = todo.pop()
        if id(x) in met or isinstance(x, stop):
            continue
        met.add(id(x))
        if isinstance(x, torch.Tensor):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple | set):
            todo += x
        elif hasattr(x, "__dict__"):
            todo += vars(x).values()
    return sum(seen.values())


# ---- checkpoints to damage ----


def edit(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def reconfigure(path, **values) -> None:
    raw = json.loads((path / "config.json").read_text())
    for key in [k for k, v in values.items() if v is Ellipsis]:
        raw.pop(key, None)
    (path / "config.json").write_text(json.dumps(raw | {k: v for k, v in values.items() if v is not Ellipsis}))


def shard(path, names=("a.safetensors", "b.safetensors")) -> dict[str, str]:
    """Split the checkpoint in two shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {n: names[i % 2] for i, n in enumerate(sorted(tensors))}
    for name in names:
        save_file({n: t for n, t in tensors.items() if where[n] == name}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where
