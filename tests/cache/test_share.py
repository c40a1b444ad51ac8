"""KVSharer: the search against its definition, maps on disk, and what sharing saves."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import STEPS, edit, masked, reconfigure, run
from hypothesis import given
from hypothesis import strategies as st
from tiny import text

from nanokv import load, parse
from nanokv.cache.plan import Plan
from nanokv.cache.whole import WholeCache
from nanokv.model.config import ModelConfig
from nanokv.sharing import search as share
from nanokv.sharing.__main__ import main
from nanokv.sharing.kvsharer import KVSharer
from nanokv.sharing.search import Pair, with_pair


@pytest.fixture
def deep(llm_of, monkeypatch, tmp_path):
    """Eight layers, and a place of its own for maps."""
    monkeypatch.setenv("NANOKV_WEIGHTS", str(tmp_path))
    return llm_of("deep")


def texts(n: int = 5, length: int = 24) -> torch.Tensor:
    return torch.tensor([text(length, seed=s) for s in range(n)])


def found(llm, **options):
    tried = []
    want = KVSharer(**options)
    result = want.search(llm.models.prefill, llm.models.ops, texts(), lambda pair, good: tried.append((pair, good)))
    return *result, tried


def test_pairs_are_ranked_by_the_distance_of_mean_keys_and_values(deep):
    cache = WholeCache({}, deep.models.ops, deep.config)
    ids = texts()
    with torch.inference_mode():
        deep.models.prefill.hidden(ids, torch.arange(24).expand(5, 24), cache)
    pairs = share.ranked_pairs(cache, 8, "dissimilar")
    assert len(pairs) == 28 and all(p.reader > p.owner for p in pairs)
    for p in pairs[:5]:
        distance = 0.0
        for x in (cache.k, cache.v):
            for h in range(2):
                for t in range(24):
                    a, b = (sum(x[i][n, h, t].double() for n in range(5)) / 5 for i in (p.reader, p.owner))
                    distance += (a - b).norm().item() / (2 * 2 * 24)
        assert p.distance == pytest.approx(distance, rel=1e-4)
    assert [p.distance for p in pairs] == sorted((p.distance for p in pairs), reverse=True)
    assert pairs[::-1] == share.ranked_pairs(cache, 8, "similar")
    assert sorted(map(str, share.ranked_pairs(cache, 8, "random"))) == sorted(map(str, pairs))


def test_the_search_takes_the_first_pairs_that_leave_the_output_similar(deep):
    layers, pairs, tried = found(deep, layers=3, threshold=-1)
    assert (
        len(layers) == len(pairs) == len(tried) == 3 and len({p.reader for p in pairs}) == 3
    )  # nothing was too unlike
    again, same, _ = found(deep, layers=3, threshold=-1)
    assert layers == again and same == pairs
    for n, pair in enumerate(pairs):  # the similarity is that of the output under the map so far
        so_far: dict[int, int] = {}
        for p in pairs[: n + 1]:
            so_far = with_pair(so_far, p)
        outs = []
        for m in ({}, so_far):
            cache = WholeCache(m, deep.models.ops, deep.config)
            with torch.inference_mode():
                outs.append(
                    deep.models.prefill.hidden(texts(), torch.arange(24).expand(5, 24), cache).double().flatten(1)
                )
        cosine = [(a @ b / a.norm() / b.norm()).item() for a, b in zip(*outs, strict=True)]
        assert pair.similarity == pytest.approx(sum(cosine) / 5, abs=1e-5)
    gate = sorted(p.similarity for p in pairs)[1]
    strict, fewer, seen = found(deep, layers=3, threshold=gate)
    assert all(p.similarity > gate for p in fewer) and any(not good for _, good in seen) and len(strict) <= 3
    assert found(deep, layers=3, threshold=1)[0] == {}


@given(st.lists(st.tuples(st.integers(1, 11), st.integers(0, 10)), max_size=12))
def test_maps_are_closed_and_layer_0_owns(raw):
    layers: dict[int, int] = {}
    for reader, owner in raw:
        if owner < reader and reader not in layers:
            layers = with_pair(layers, Pair(reader, owner, math.nan))
    assert all(o < i and o not in layers for i, o in layers.items()) and 0 not in layers


def test_sharing_no_layer_is_the_baseline_bit_for_bit(deep):
    prompt, more = text(60, seed=5), text(STEPS, seed=6)
    none, full = (run(deep, p, [prompt], [more])[0] for p in ("kvsharer:layers=0", "full"))
    assert torch.equal(none, full)


def test_prefill_and_32_steps_equal_substituted_keys_and_values(deep):
    """The released code counts stored layers where it should ask which are stored, and overwrites owners 6 and 7 of this map."""
    layers = {2: 0, 4: 3}
    plan, prompt, more = Plan(share=layers), text(40, seed=5), text(32, seed=6)
    session = deep.session(32, plan=plan)
    logits = [session.start([prompt])]
    for t, token in enumerate(more):
        logits.append(session.feed(torch.tensor([[token]])))
        lengths = {i: s.slots.length.flatten().tolist() for i, s in session.cache.stores.items()}
        assert lengths == {i: [40 + t + 1] * 2 for i in (0, 1, 3, 5, 6, 7)}
    everything = {i: {o: [list(range(i + 1))] * 2 for o in range(8)} for i in range(72)}
    right = masked(deep, prompt + more, 40, everything, layers)
    torch.testing.assert_close(torch.cat(logits), right, atol=1e-4, rtol=1e-4)
    forgetful = {i: {o: [[i] if o >= 6 else held[0]] * 2 for o, held in row.items()} for i, row in everything.items()}
    assert (masked(deep, prompt + more, 40, {i: forgetful[i] for i in range(40, 72)}, layers) - right)[
        1:
    ].abs().max() > 0.1


def test_readers_never_touch_their_key_and_value_weights(deep, tiny):
    from nanokv import load

    llm, prompt, more = load(str(tiny("deep")[0]), dtype="float32"), text(30, seed=5), text(STEPS, seed=6)
    plan = Plan(share={2: 0, 7: 3})
    right, _ = run(llm, plan, [prompt], [more])
    for i in (2, 7):
        attention = llm.models.decode.layers[i].self_attn
        attention.qkv_proj.weight.data[attention.heads * attention.dim :] = math.nan
    broken, _ = run(llm, plan, [prompt], [more])
    assert torch.equal(broken, right) and right.isfinite().all()


@pytest.mark.parametrize("n", [1, 3, 6])
def test_bytes_are_those_of_the_owning_layers(n, deep):
    sizes = {}
    for plan in ("full", f"kvsharer:layers={n},threshold=-1"):
        session = deep.session(9, plan=parse(plan))
        session.start([text(50, seed=1)])
        session.feed(torch.tensor([[1]]))
        sizes[plan] = session.report().bytes
        shared = [x for x in session.report().layers if x.owner != x.layer]
        assert all(x.bytes == 0 and x.owner < x.layer for x in shared)
    assert sizes["full"] * (8 - n) == list(sizes.values())[1] * 8


def test_a_plan_finds_the_map_that_an_earlier_search_left(deep, tmp_path, monkeypatch):
    plan = parse("snapkv:budget=20,window=4+kvsharer:layers=2,threshold=-1")
    with pytest.raises(ValueError, match="has not measured the model yet"):
        plan.fit(deep.config, torch.float32, 60, 8)
    ready = deep.ready(plan)
    file = next((tmp_path / "maps").iterdir())
    facts = json.loads(file.read_text())
    assert {int(i): o for i, o in facts["map"].items()} == ready.share and len(facts["pairs"]) == 2
    assert facts["fingerprint"] == deep.fingerprint() and str(ready) == str(plan)
    monkeypatch.setattr(KVSharer, "search", lambda *_: pytest.fail("searched again"))
    assert deep.ready(plan).share == ready.share
    assert deep.ready(parse(f"kvsharer:map={file}")).share == ready.share
    for broken in (
        {**facts, "fingerprint": "x"},
        {**facts, "map": {"3": 2, "2": 0}},
        {**facts, "map": {"9": 0}},
        [],
        {},
    ):
        (tmp_path / "other.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"is (no map|the map of another)"):
            deep.ready(parse(f"kvsharer:map={tmp_path / 'other.json'}"))


def test_a_saved_cache_remembers_who_reads_whom(deep, tmp_path):
    from nanokv.save import restore, save

    plan = deep.ready(parse("snapkv:budget=20,window=4+kvsharer:layers=2,threshold=-1"))
    session = deep.session(4, plan=plan)
    session.start([text(60, seed=5)])
    save(deep, session, tmp_path / "c")
    again = restore(deep, tmp_path / "c", 4)
    assert again.plans[0].share == plan.share
    assert torch.equal(*(s.feed(torch.tensor([[3]])) for s in (session, again)))


def test_sizes_are_told_before_there_is_a_map(deep):
    plan = parse("kvsharer:layers=3")
    assert len(plan.sketch(8).share) == 3 and plan.sketch(8).ready
    assert replace(plan, share={1: 0}, ready=True).sketch(8).share == {1: 0}


def test_the_program_prints_pairs_and_writes_the_map(tiny, tmp_path, capsys):
    file = tmp_path / "m.json"
    argv = ["search", "--model", str(tiny("deep")[0]), "--layers", "2", "--threshold", "-1", "--dtype", "fp32"]
    assert main([*argv, "--out", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.count("output's cosine") == 2 and "2 of 8 layers own no cache" in out and "Traceback" not in err
    assert len(json.loads(file.read_text())["map"]) == 2
    assert main([*argv, "--order", "best"]) == 2
    assert "orders are dissimilar, similar and random" in capsys.readouterr().err


def test_a_model_with_other_weights_has_another_fingerprint(deep, tiny):
    from nanokv import load

    other = load(str(tiny("deep")[0]), dtype="bfloat16")
    assert other.fingerprint() == deep.fingerprint()
    with torch.no_grad():
        other.models.prefill.layers[3].mlp.down_proj.weight.neg_()
    assert other.fingerprint() != deep.fingerprint()


def test_fewer_layers_than_asked_are_told(deep):
    ready = deep.ready(parse("kvsharer:layers=5,threshold=0.99999"))
    assert ready.sharer.layers == len(ready.share) < 5
    session = deep.session(3, plan=deep.ready(parse("kvsharer:layers=2,threshold=-1")))
    session.start([text(20)])
    assert str(session.report()).split(" · ")[2] == "2 layers read another's"
    assert parse("kvsharer:layers=0").sketch(8).share == {}


@pytest.mark.parametrize("factor", [2, 3])
def test_a_model_trained_with_shared_layers_reads_them_without_being_asked(factor, tiny, tmp_path, deep):
    path, readers = tmp_path / "cla", {i: i - i % factor for i in range(8) if i % factor}
    shutil.copytree(tiny("deep")[0], path)
    mine = [f"model.layers.{i}.self_attn.{x}_proj.weight" for i in readers for x in "kv"]
    edit(path, lambda tensors: [tensors.pop(name) for name in mine])
    reconfigure(path, use_cla=True, cla_share_factor=factor)
    llm = load(str(path), dtype="float32")
    for plan in ("full", "snapkv:budget=20,window=4+int4:group=4,residual=6"):
        prompt, more = text(40, seed=5), text(STEPS, seed=6)
        found = run(llm, plan, [prompt], [more])[0]
        right = run(deep, replace(parse(plan), share=readers), [prompt], [more])[0]
        assert torch.equal(found, right)
        assert set(llm.last.cache.stores) == set(range(8)) - set(readers)
    with pytest.raises(ValueError, match="was trained with shared layers"):
        llm.ready(parse("kvsharer:layers=2"))
    reconfigure(path, use_cla=False)
    with pytest.raises(ValueError, match=f"lacks {len(mine)} tensors"):
        load(str(path))


def test_layers_of_different_windows_were_not_trained_to_share(tiny):
    raw = json.loads((tiny("windows")[0] / "config.json").read_text())
    with pytest.raises(ValueError, match="share a cache that have different sliding windows"):
        ModelConfig.from_json(raw | {"use_cla": True, "cla_share_factor": 2}, "config.json")
