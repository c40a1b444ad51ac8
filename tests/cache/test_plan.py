"""Plans as text: parsing, printing, refusing."""

from __future__ import annotations

import pytest
import torch
from helpers import PLANS
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv import parse
from nanokv.cache.plan import AXES
from nanokv.model.presets import PRESETS


@pytest.mark.parametrize("plan", PLANS)
def test_a_printed_plan_reads_back_as_itself(plan):
    assert str(parse(str(parse(plan)))) == str(parse(plan))


def test_defaults_are_filled_in():
    split = "layers=flat,heads=flat,select=token,every=0,beta=20,squeeze=0.3,floor=0.2,chunk=20,demote=false"
    split += ",merge=none,refit=none"
    assert str(parse("snapkv:budget=512")) == f"snapkv:budget=512,{split},window=32,kernel=7,pool=max,group=mean+dense"
    fitted = parse("simlayer").fit(PRESETS["llama2-7b"], torch.float16, 4000, 10)
    assert (
        str(fitted) == "simlayer:variant=prefill,threshold=0.65,sink=4,recent=1024,window=32,roll=true,full=50%+dense"
    )
    released = parse("simlayer:variant=decode").fit(PRESETS["llama3-8b"], torch.float16, 4000, 10).policy
    assert (
        released.threshold,
        released.window,
        released.roll,
        released.decide_after,
        released.request.last_queries,
    ) == (
        0.9,
        1,
        False,
        1,
        1,
    )
    light = parse("simlayer:variant=light").fit(PRESETS["tinyllama-1.1b"], torch.float16, 4000, 10).policy
    assert (light.full, light.recent) == (11, 1020)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snap", "unknown policy 'snap' (did you mean snapkv"),
        ("snapkv+streaming", "snapkv and streaming both decide which tokens stay; choose one"),
        ("dense+dense", "both decide how they are stored"),
        ("", "unknown policy ''"),
        ("snapkv:budgt=5", "snapkv has no key 'budgt' (did you mean budget?)"),
        ("full:x=1", "full has no key 'x'; it takes none"),
        ("snapkv:budget", "is no key=value pair"),
        ("snapkv:budget=1,budget=2", "given twice"),
        ("snapkv:window=many", "it takes a whole number"),
        ("snapkv:budget=lots", "is no budget"),
        ("snapkv:budget=5", "give at least 32 tokens"),
        ("snapkv:budget=0%", "out of range"),
        ("snapkv:budget=101%", "out of range"),
        ("snapkv:budget=-1MiB", "out of range"),
        ("snapkv:budget=nan%", "out of range"),
        ("snapkv:kernel=4", "kernel odd"),
        ("snapkv:window=0", "window ≥ 1"),
        ("snapkv:pool=min", "pool is max or avg"),
        ("streaming:recent=0", "recent ≥ 1"),
        ("streaming:budget=4", "give at least 5 tokens"),
        ("simlayer:variant=lazy", "variants are prefill, decode and light"),
        ("simlayer:roll=maybe", "true or false"),
        ("simlayer:threshold=high", "a number or none"),
        ("simlayer:full=half", "a percent such as 50%"),
        ("simlayer:full=0.5", "a percent such as 50%"),
        ("simlayer:full=5%%", "a percent such as 50%"),
        ("simlayer:full=-1", "a percent such as 50%"),
        ("simlayer:threshold=5", "from 0 to 1"),
        ("simlayer:threshold=nan", "from 0 to 1"),
        ("random:seed=99999999999999999", "give less than 2^31"),
        ("snapkv:layers=cone", "layers is flat or pyramid or squeeze"),
        ("snapkv:heads=all", "heads is flat or ada"),
        ("snapkv:select=word", "select is token or chunk"),
        ("snapkv:floor=2", "floor and squeeze 0 … 1"),
        ("snapkv:every=8", "every=8 is too often: a rescore needs 32 new queries"),
        ("snapkv:every=-1", "snapkv: every=-1; give a number of tokens, or 0 for never"),
        ("h2o:every=5", "never rescores; leave it out"),
        ("h2o:recent=2", "a share of the budget"),
        ("tova:heads=ada", "use heads=flat"),
        ("keyformer:tau=0", "tau > 0"),
        ("keyformer:tau=nan", "tau > 0"),
        ("scissorhands:every=0", "each at least 1"),
        ("scissorhands:budget=100", "give at least 138 tokens"),
        ("corm:window=0", "each at least 1"),
        ("cascade:rings=0", "rings ≥ 1"),
        ("cascade:budget=7", "give at least 8 tokens"),
        ("duo:full=2", "full 0 … 1"),
        ("expected:future=0", "future ≥ 1"),
        ("streaming:positions=here", "positions are absolute and cache"),
        ("kvsharer:layers=-1", "layers ≥ 0"),
        ("kvsharer:threshold=2", "a cosine from −1 to 1"),
        ("kvsharer:order=best", "orders are dissimilar, similar and random"),
        ("kvsharer+kvsharer", "both decide which layers own storage"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(text, says):
    with pytest.raises(ValueError) as e:
        parse(text)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_path_in_a_plan_keeps_its_capitals():
    for text in ("kvsharer:map=/tmp/Maps/A.json", "duo:gates=/tmp/Some/File.TSV"):
        path = text.partition("=")[2]
        assert path in str(parse(text)) and str(parse(str(parse(text)))) == str(parse(text))


def test_bytes_are_not_promised_where_heads_are_padded():
    plan = parse("adakv:budget=64MiB+dense")
    with pytest.raises(ValueError, match="use store ragged, or give tokens or percent"):
        plan.fit(PRESETS["llama3-8b"], torch.bfloat16, 8000, 10)
    assert parse("adakv:budget=64MiB").fit(PRESETS["llama3-8b"], torch.bfloat16, 8000, 10).policy.budget > 100


def test_a_policy_whose_heads_differ_takes_the_store_that_frees_their_bytes():
    for text in ("adakv", "snapkv:heads=ada", "corm", "duo"):
        assert parse(text).names[1] == "ragged" and parse(text + "+dense").names[1] == "dense"
    assert parse("snapkv").names[1] == parse("kvsharer").names[1] == "dense"
    assert str(parse("kvsharer:layers=3")) == "full+dense+kvsharer:layers=3,map=none,threshold=0.5,order=dissimilar"


def test_simlayer_asks_for_a_threshold_where_the_family_is_unknown():
    with pytest.raises(ValueError, match=r"simlayer:threshold=0\.8, or use simlayer:variant=light"):
        parse("simlayer").fit(PRESETS["tinyllama-1.1b"], torch.float16, 4000, 10)


def test_budgets_are_tokens_percent_of_the_prompt_or_bytes_of_the_whole_cache():
    config = PRESETS["llama3-8b"]

    def kept(budget: str, prompt: int = 8000, room: int = 100) -> int:
        return parse(f"snapkv:budget={budget}").fit(config, torch.bfloat16, prompt, room).policy.budget

    assert kept("512") == 512 and kept("25%") == 2000 and kept("25%", prompt=40) == 32
    per_token = 32 * 8 * (2 * 128 * 2 + 4)
    assert kept("256MiB") == pytest.approx(256 * 2**20 / per_token - 100, abs=1)
    assert parse("streaming").with_budget("512").fit(config, torch.bfloat16, 8000, 100).policy.recent == 508
    with pytest.raises(ValueError, match="give 17MiB or more"):
        kept("1MiB")
    for name in ("full", "simlayer"):
        with pytest.raises(ValueError, match="takes no budget"):
            parse(name).with_budget("512")


def test_sharing_is_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match="this model has 8 layers, and the first owns its cache; give at most 7"):
        parse("kvsharer:layers=8").sketch(8)
    assert len(parse("kvsharer:layers=7").sketch(8).share) == 7
    with pytest.raises(ValueError, match="layers are merged in pairs by minicache"):
        parse("minicache+kvsharer:layers=2")
    with pytest.raises(ValueError, match="leave one of the two out"):
        parse("kvsharer:layers=2").with_store("minicache", {}, {})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [*(n for p in AXES.values() for n in p), ":", "=", ",", "+", "budget", "window", "7", "x", "%", " "]
        ),
        max_size=9,
    )
)
def test_any_text_is_a_plan_or_a_one_line_error(pieces):
    try:
        assert parse(str(parse("".join(pieces))))
    except ValueError as e:
        assert "\n" not in str(e)
