"""Bits by layer: which layers get them, what the measurement sees, and the file that keeps it."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch
from tiny import text

from kernels import reference
from nanokv import load, parse, sensitivity
from nanokv.save import restore, save
from nanokv.stores.quant.int import Int
from nanokv.stores.quant.tuned import Tuned, allocate


def cost_of(bits: int) -> float:
    """What so many bits cost, where 2 cost 1: the squared distance of two levels."""
    return (3 / (2**bits - 1)) ** 2


def brute_force(costs: list[float], bits: float) -> float:
    """The least total cost of all assignments."""
    fits = (how for how in itertools.product((2, 4, 8), repeat=len(costs)) if sum(how) <= bits * len(costs))
    return min(sum(c * cost_of(b) for c, b in zip(costs, how, strict=True)) for how in fits)


@pytest.mark.parametrize("seed", range(20))
def test_bits_go_where_they_save_most(seed):
    """Each further bit saves less, so only the last step can miss the best."""
    dice = random.Random(seed)
    costs = [10 ** dice.uniform(-4, 0) for _ in range(6)]
    for bits in (2, 2.7, 4, 5.5, 8):
        found = allocate(costs, bits)
        paid = sum(c * cost_of(b) for c, b in zip(costs, found, strict=True))
        assert sum(found) <= bits * len(costs) and (sum(found) > bits * len(costs) - 4 or bits == 8)
        assert brute_force(costs, bits) <= paid * (1 + 1e-9)
        assert paid <= brute_force(costs, max(2, bits - 4 / len(costs))) * (1 + 1e-9)


def test_a_sensitive_layer_gets_more_bits():
    found = {"k": [90.0, 0.1, 0.1], "v": [0.1, 0.1, 2.0]}
    assert Tuned(bits=4).with_sensitivity(found).layers == "k8v2-k4v2-k4v4"
    assert Tuned(bits=2).with_sensitivity(found).layers == "k2v2x3"
    assert Tuned(bits=8).with_sensitivity(found).layers == "k8v8x3"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("bits=1.5", "from 2 to 8"),
        ("layers=k3v4", "bits are 2, 4 or 8"),
        ("layers=k8v4x", "is no k8v4 or k8v4x2"),
        ("layers=k8v4x0", "names no layer"),
        ("group=1", "group"),
    ],
)
def test_what_cannot_be_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        parse(f"full+tuned:{given}")


def test_each_layer_is_the_int_store_of_its_bits(llm_of):
    plan = parse("full+tuned:layers=k8v4-k2v2,group=4,residual=2")
    assert [plan.store.at(i, 3) for i in range(3)] == [
        Int(k=k, v=v, group=4, residual=2) for k, v in ((8, 4), (2, 2), (2, 2))
    ]
    session = llm_of("g3").session(8, plan=plan)
    session.start([text(40, 1)])
    assert [(s.spec.k, s.spec.v) for s in session.cache.stores.values()] == [(8, 4), (2, 2), (2, 2)]
    with pytest.raises(ValueError, match="names the bits of 4 layers, and this model has 3"):
        llm_of("g3").session(8, plan=parse("full+tuned:layers=k8v4x4")).start([text(9, 1)])


def logits_with_one_rounded(llm, ids: torch.Tensor, layer: int, part: str, group: int) -> torch.Tensor:
    """(T,vocab): a plain forward pass of one text in which k or v of one layer is rounded."""
    model, config = llm.models.prefill, llm.config
    G = config.num_attention_heads // config.num_key_value_heads

    class Plain:
        owns = True

        def __init__(self, i):
            self.i = i

        def attend(self, q, k, v, pos):
            if self.i == layer:
                whole = k.shape[2] // group * group
                x, how = (k, (group, 1)) if part == "k" else (v, (1, math.gcd(group, v.shape[3])))
                codes = reference.quantize(x[:, :, :whole].contiguous(), 2, *how)
                x = torch.cat((reference.dequantize(*codes, 2), x[:, :, whole:]), 2)
                k, v = (x, v) if part == "k" else (k, x)
            k, v = (x.repeat_interleave(G, 1) for x in (k, v))
            score = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
            hidden = torch.ones(score.shape[2:], dtype=torch.bool).triu(1)
            return score.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    class Cache:
        def __init__(self):
            self.layers = [Plain(i) for i in range(config.num_hidden_layers)]

    with torch.inference_mode():
        return model.logits(model.hidden(ids[None], torch.arange(len(ids))[None], Cache()))[0]


def test_the_sensitivity_is_that_of_a_plain_loop(llm_of):
    llm, store = llm_of("g3"), Tuned(group=8)
    texts = torch.tensor([text(42, 1), text(42, 2)])
    found = sensitivity.measure(llm.models.prefill, llm.models.ops, store, texts, lambda: None)
    for part, layer in itertools.product("kv", range(3)):
        kl = []
        for ids in texts:
            p, q = (
                logits_with_one_rounded(llm, ids, at, part, 8).double().softmax(-1)[:: sensitivity.EVERY]
                for at in (-1, layer)
            )
            kl += (p * (p / q).log()).sum(-1).tolist()
        assert found[part][layer] > 0
        torch.testing.assert_close(found[part][layer], sum(kl) / len(kl), rtol=1e-3, atol=1e-6)


def test_a_model_is_measured_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOKV_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(sensitivity.passages, "__defaults__", (2, 40))
    llm = load(str(tiny("g3")[0]), dtype="float32")
    plan = llm.ready(parse("full+tuned:bits=3,group=8"))
    (file,) = (tmp_path / "maps").iterdir()
    both = [plan.store.at(i, 3) for i in range(3)]
    assert plan.ready and 2.34 <= sum(x.k + x.v for x in both) / 6 <= 3
    assert parse(str(plan)) == plan  # the plan that runs names its bits
    monkeypatch.setattr(sensitivity, "measure", None)
    assert llm.ready(parse("full+tuned:bits=3,group=8")) == plan
    assert llm.ready(parse("full+tuned:bits=8,group=8")).store.layers == "k8v8x3"
    assert sensitivity.passages(llm.tokenizer, 48).shape == (2, 48)  # a group that is longer than the text
    facts = json.loads(file.read_text())
    for damage, says in (
        ({"fingerprint": "x"}, "is of another model"),
        ({"sensitivity": {}}, "does not hold"),
        ({"sensitivity": None}, "does not hold"),
        *(
            ({"sensitivity": facts["sensitivity"] | {"k": k}}, "does not hold")
            for k in ([1.0], ["a"] * 3, [1.0, True, 2.0], [1.0, 10**400, 2.0], [-1.0] * 3)
        ),
        ("{", "cannot be read as JSON"),
    ):
        file.write_text(damage if isinstance(damage, str) else json.dumps(facts | damage))
        with pytest.raises(ValueError, match=f"{says}.*; delete it to measure again"):
            llm.ready(parse("full+tuned:group=8"))


def test_a_file_that_cannot_be_written_is_told_before_measuring(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOKV_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(sensitivity, "measure", None)
    (tmp_path / "maps").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*tuned:layers=k8v4x2-k4v2"):
        load(str(tiny("g3")[0]), "full+tuned", dtype="float32")


def test_a_saved_cache_needs_no_measurement(llm_of, tmp_path, monkeypatch):
    """Its plan names the bits of each layer."""
    monkeypatch.setattr(sensitivity, "measure", None)
    llm, plan = llm_of("g3"), parse("full+tuned:layers=k8v4-k2v4,group=4,residual=2")
    session = llm.session(8, plan=plan)
    session.start([text(40, 1)])
    save(llm, session, tmp_path / "cache.safetensors")
    again = restore(llm, tmp_path / "cache.safetensors", 8)
    assert again.plans[0].store == plan.store
    more = torch.tensor([text(5, 2)])
    torch.testing.assert_close(again.feed(more), session.feed(more))
