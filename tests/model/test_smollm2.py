"""The main job on the real model: needles found, receipts true, one full layer at a time."""

from __future__ import annotations

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import storages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evals.tasks import needle, prose
from nanokv import parse
from nanokv.cache.context import Context
from nanokv.runner import Eager

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fast():
    """The same in the type that this CPU multiplies fastest: where that is bfloat16, a long prompt takes a fifth of the time."""
    from nanokv import load

    torch.set_num_threads(2)
    yield load("smollm2-135m")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def short(fast):
    """The first LAYERS layers of it, for tests that count what is held and do not read what is written."""

    def cut(model):
        few = copy.copy(model)
        few._modules = {**model._modules, "layers": model.layers[:LAYERS]}
        few.config = replace(model.config, num_hidden_layers=LAYERS)
        return few

    models = fast.models
    prefill = cut(models.prefill)
    decode = prefill if models.decode is models.prefill else cut(models.decode)
    few = copy.copy(fast)
    few.models, few.config = replace(models, prefill=prefill, decode=decode, runner=Eager(decode)), decode.config
    return few


LAYERS = 4


@pytest.fixture(scope="module")
def count(smollm):
    return lambda text: len(smollm.tokenizer.encode(text, special=False))


NEEDLES = [
    "full",
    "snapkv:budget=25%,window=8,kernel=13,pool=max",
    "random:budget=25%,window=8",
    "full+int4",
    "full+turbo:k=2,v=2",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("texts", [3, 20])
def test_needles_are_found_by_snapkv_and_under_four_bits_not_by_chance_or_two(texts, smollm, count):
    """1,000 tokens, a seven-digit code of which each digit is a token: pooling must be as wide as the answer. One prefill serves all."""
    from nanokv.inspect.dense import begin
    from nanokv.inspect.fidelity import follow, greedy

    found = dict.fromkeys(NEEDLES, 0)
    for seed in range(texts):
        task = needle(seed, 1000, count)
        ids = smollm.tokenizer.encode(task.unfinished)
        for i, start in begin(smollm, [parse(p) for p in NEEDLES], ids, 9):
            found[NEEDLES[i]] += task.solved(smollm.tokenizer.decode(follow(*start(), 9, greedy)[0]))
    assert found["full"] == texts and found["full+int4"] >= 0.95 * texts, found
    assert found[NEEDLES[1]] >= 0.9 * texts, found
    assert found[NEEDLES[2]] == 0 and found["full+turbo:k=2,v=2"] <= 0.5 * texts, found


@pytest.mark.exhaustive
def test_rounding_keys_hurts_more_than_rounding_values(smollm):
    """Two bits for one of them and eight for the other, odds against the full cache's on prose."""
    from evals.quality import fidelity

    plans = [parse(p) for p in ("full", "full+int:k=2,v=8", "full+int:k=8,v=2", "full+int4", "full+int8")]
    _, keys, values, four, eight = (sum(r["kl"]) / len(r["kl"]) for r in fidelity(smollm, plans, 0, 600, 12))
    assert keys > values > eight and four > 3 * eight and keys > four, (keys, values, four, eight)


def test_lazy_layers_and_four_bits_take_a_fifth_of_the_memory(short):
    """SimLayerKV's headline: half the layers hold 1,024 tokens, and all of them 4 bits; scales, windows and positions included."""
    from evals.quality import text_of

    session = short.session(32, None, parse("simlayer:variant=light+kivi4"))
    session.start([text_of(short, 0, 7500)])
    for _ in range(3):
        session.feed(torch.tensor([[1]]))
    report = session.report()
    assert len(report.evicting_layers) == LAYERS // 2 and report.used_bytes <= report.full_bytes / 4.8
    assert report.bytes == storages(session.cache, {}, (Context, type(short.config)))


PLANS = {
    "full": lambda n: {n},
    "streaming": lambda n: {1024},
    "snapkv": lambda n: {1024 + 8},
    "simlayer": lambda n: {1028, n},
}


@pytest.mark.exhaustive
def test_four_policies_on_a_long_text(fast, count):
    """One prefill serves all of them."""
    from nanokv.inspect.dense import begin
    from nanokv.inspect.fidelity import follow, greedy

    task = needle(3, 1500, count, depth=0.4)
    ids = fast.tokenizer.encode(task.unfinished)
    for (name, held), (_, start) in zip(PLANS.items(), begin(fast, [parse(p) for p in PLANS], ids, 9), strict=True):
        session, before = start()
        written = fast.tokenizer.decode(follow(session, before, 9, greedy)[0])  # a space and seven digits, and one more
        report = session.report()
        assert task.solved(written) or name != "full"
        assert report.bytes == storages(session.cache, {}, (Context, type(fast.config)))
        assert {n for layer in report.layers for n in layer.kept[0]} == held(session.seen[0])
        if name == "simlayer":
            assert 5 <= len(report.evicting_layers) <= 25


class LiveBytes(TorchDispatchMode):
    """Counts the storages of half-precision or wider 4-D tensors that are alive, as they come and go; a mark takes the peak."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.live, self.peak, self.known = least, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.least:
                self.note(x.untyped_storage())
        return out

    def note(self, storage) -> None:
        key, n = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += n
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.gone, key, n)

    def gone(self, key: int, n: int) -> None:
        self.known.discard(key)
        self.live -= n


def layers_alive(llm, plan: str, ids: list[int], chunk: int | None = None) -> list[int]:
    """Per layer, when the layer after it begins: how many bytes of earlier layers' keys and values are held by the prompt's cache."""
    from nanokv.cache.prefill import PromptCache

    seen, plan = [], parse(plan).fit(llm.config, llm.models.new_context().dtype, len(ids), 8)
    cache = PromptCache(plan, torch.tensor(ids), llm.models.new_context())

    def held(block, x, pos, angle, layer):
        tensors: dict[int, int] = {}
        storages([cache.dense, cache.kept], tensors, (type(cache),))
        seen.append(sum(tensors.values()))
        return block(x, pos, angle, layer)

    with torch.inference_mode():
        for a in range(0, len(ids), chunk or len(ids)):
            part = torch.tensor([ids[a : a + (chunk or len(ids))]])
            llm.models.prefill.hidden(part, torch.arange(a, a + part.shape[1])[None], cache, run=held)
    return seen


def test_a_prefill_of_3000_tokens_holds_one_full_layer_at_a_time(short, count):
    ids = short.tokenizer.encode(needle(1, 3000, count).unfinished)[:3000]
    size = short.models.prefill.embed_tokens.weight.itemsize
    one = 2 * 3000 * 3 * 64 * size  # K and V of one full layer
    kept = 512 * 3 * (2 * 64 * size + 4) + 3 * 4 * 3
    between = layers_alive(short, "snapkv:budget=512", ids)
    assert between == [i * kept for i in range(LAYERS)]  # nothing of a finished layer but what it keeps
    few, one = ids[:1000], one // 3
    full = layers_alive(short, "full", few)
    assert full[LAYERS - 1] >= (LAYERS - 1) * one
    chunked = layers_alive(short, "snapkv:budget=512", few, chunk=500)
    assert chunked[LAYERS] >= LAYERS * one  # with chunks, every layer lives until the last one


def test_the_peak_of_a_compressed_prefill_is_far_below_the_full_cache(short, count):
    """Every storage large enough to hold half a layer's keys, counted at allocation and release."""
    ids = short.tokenizer.encode(needle(1, 3000, count).unfinished)[:3000]
    one, peaks = 2 * 3000 * 3 * 64 * short.models.prefill.embed_tokens.weight.itemsize, {}
    for plan in ("snapkv:budget=512", "full"):
        session = short.session(8, None, parse(plan))
        with LiveBytes(least=one // 4) as counter:
            session.start([ids])
        peaks[plan] = counter.peak
        del session
    short.last = None
    # both peaks hold the same activations (x, gate|up, …); what differs is LAYERS - 1 more full layers
    assert peaks["full"] - peaks["snapkv:budget=512"] >= (LAYERS - 2) * one


def test_the_short_way_from_python_runs(capsys):
    from nanokv import load

    llm = load("smollm2-135m", plan="snapkv:budget=256+int4")
    for piece in llm.stream("Once upon a time", max_new_tokens=8):
        print(piece, end="")
    assert len(capsys.readouterr().out.split()) > 3 and "kv: " in str(llm.report())
    assert json.loads(json.dumps(llm.report().as_dict()))["ratio"] > 0


@pytest.mark.exhaustive
def test_eight_rows_hold_a_common_prefix_once_and_write_what_each_writes_alone(smollm):
    """About five minutes on two cores, most of them for the rows alone."""
    encode = smollm.tokenizer.encode
    prefix = encode(" ".join(prose()))[:4096]
    rows = [[*prefix, *encode(f"\n\nQuestion {i}: what does {word} mean?\nAnswer:")] for i, word in enumerate(WORDS)]

    def answered(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        session = smollm.session(16, plan=parse("full"))
        answer = smollm.answer(session, prompts, limit=16, ignore_eos=True)
        list(answer)
        return answer.ids, session.report().bytes

    together, size = answered(rows)
    alone = [answered([row]) for row in rows]
    assert together == [ids for (ids,), _ in alone]
    per_token = max(each for _, each in alone) / (max(map(len, rows)) + 16)
    tails = sum(len(row) - len(prefix) + 16 for row in rows)
    assert size <= 1.1 * per_token * len(prefix) + per_token * tails


WORDS = "lambda", "yield", "class", "import", "global", "assert", "raise", "with"
