"""Faults that once gave a wrong or lost result with exit status 0, each by its right value."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import edit, reconfigure
from test_cli import call
from tiny import text
from tokenizers import Tokenizer as Fast

import generate
from nanokv import load, parse
from nanokv.inspect.fidelity import compare
from nanokv.save import restore
from nanokv.text.sampler import finite

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def path(tiny, tmp_path):
    """A small checkpoint of one's own."""
    shutil.copytree(tiny("g3")[0], tmp_path / "m")
    return tmp_path / "m"


def test_what_a_tokenizer_file_says_of_clipping_never_reaches_a_prompt(path):
    tok = Fast.from_file(str(path / "tokenizer.json"))
    tok.enable_truncation(64)
    tok.enable_padding(length=700)
    tok.save(str(path / "tokenizer.json"))
    assert len(load(str(path)).tokenizer.encode("x" * 600)) == 600


def test_a_cache_that_was_loaded_is_saved_with_all_that_followed(path, capsys):
    base = ["--model", path, "--dtype", "float32", "--ignore-eos"]
    assert call(capsys, *base, "-p", "hello world", "-n", "1", "--save-cache", path / "a")[0] == 0
    more = [*base, "--load-cache", path / "a", "-p", " and more", "-n", "5"]
    status, out, _ = call(capsys, *more, "--save-cache", path / "b")
    assert status == 0 and len(out.rstrip("\n")) == 5
    llm = load(str(path), dtype="float32")
    session = restore(llm, path / "b", 8)
    ids = llm.tokenizer.encode("hello world") + llm.tokenizer.encode_more(" and more" + out.rstrip("\n"))
    assert session.seen == [len(ids)]
    whole = llm.session(8, plan=parse("full"))
    whole.start([ids])
    new = torch.tensor([[7]])
    torch.testing.assert_close(session.feed(new), whole.feed(new), atol=1e-4, rtol=1e-4)
    assert call(capsys, *more, "--save-cache", path / "a")[0] == 0  # into the same file, too
    assert restore(llm, path / "a", 1).seen == [len(ids)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "flags", [[], ["--temperature", "0.8"], ["--compare", "full"], ["--num-samples", "2", "--temp", "1"]]
)
def test_logits_that_are_no_numbers_end_in_an_error(value, flags, path, capsys):
    edit(path, lambda tensors: tensors[HEAD].fill_(value))
    status, out, err = call(capsys, "--model", path, "-p", "hello", "-n", "4", "--policy", "streaming:recent=3", *flags)
    assert status == 2 and not out.strip() and "not finite" in err and "agree" not in err and "same greedy" not in err


def test_no_statistic_comes_of_a_nan():
    good = torch.randn(3, 8)
    assert finite(good) is good
    for bad in (good.clone().fill_(torch.nan), good.clone().index_fill_(0, torch.tensor([1]), torch.inf)):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="not finite"):
                compare(*pair, [0, 1, 2])


def logits(path) -> torch.Tensor:
    llm = load(str(path), dtype="float32")
    return llm.session(1).start([text(20, 1)])


def test_a_head_of_its_own_is_used_whatever_the_config_says(path):
    right = logits(path)
    reconfigure(path, tie_word_embeddings=True)
    torch.testing.assert_close(logits(path), right, atol=0, rtol=0)
    llm = load(str(path), dtype="float32/bfloat16")
    decode = llm.models.decode
    assert decode.lm_head.weight is not decode.embed_tokens.weight  # the copy in another type has it, too


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("missing", [HEAD, EMBEDDING])
def test_one_of_head_and_embedding_serves_as_both(tied, missing, path):
    other = EMBEDDING if missing == HEAD else HEAD
    edit(path, lambda tensors: tensors.update({missing: tensors[other].clone()}))
    reconfigure(path, tie_word_embeddings=False)
    right = logits(path)
    edit(path, lambda tensors: tensors.pop(missing))
    reconfigure(path, tie_word_embeddings=tied)
    torch.testing.assert_close(logits(path), right, atol=0, rtol=0)


@pytest.mark.parametrize(
    "value", ["-- select user_name from my_table", "--foo_bar baz", "--", "-1", "--max_new_tokens_x", "a_b=c_d"]
)
@pytest.mark.parametrize("flag", ["-p", "--prompt", "--stop", "--question", "--prompt_file"])
def test_a_value_is_never_changed_and_may_begin_with_dashes(flag, value):
    args = vars(generate.parser().parse_args([flag, value, "--max_new_tokens", "3"]))
    key = {"-p": "prompt"}.get(flag, flag.lstrip("-").replace("-", "_"))
    assert args[key] == ([value] if flag == "--stop" else value) and args["max_new_tokens"] == 3


def test_a_flag_is_no_value(capsys):
    for argv in (["-p", "--chat"], ["--prompt", "--max_new_tokens", "3"], ["-p"]):
        with pytest.raises(SystemExit):
            generate.parser().parse_args(argv)
        assert "expected one argument" in capsys.readouterr().err
    assert generate.parser().parse_args(["--prompt=--chat"]).prompt == "--chat"


def test_a_stop_text_that_is_a_special_token_stops_by_its_id(path, capsys):
    base = ["--model", path, "-p", "hello", "-n", "30", "--dtype", "float32", "--ignore-eos"]
    call(capsys, *base, "--json", path / "o.json")
    ids = json.loads((path / "o.json").read_text())["token_ids"]
    at = next(i for i, t in enumerate(ids) if i > 3 and t not in ids[:i] and 0 < t < 95)
    mark = chr(ids[at] + 32)
    tok = Fast.from_file(str(path / "tokenizer.json"))
    tok.add_special_tokens([mark])
    tok.save(str(path / "tokenizer.json"))
    assert mark not in "hello"
    status, out, _ = call(capsys, *base, "--stop", mark, "--json", path / "p.json")
    record = json.loads((path / "p.json").read_text())
    assert status == 0 and record["finish_reason"] == "stop" and record["token_ids"] == ids[:at] and mark not in out


def test_one_string_is_one_stop(path):
    llm = load(str(path), dtype="float32")
    whole = "".join(llm.stream("hello", max_new_tokens=30))
    stop = whole[9:12]
    assert "".join(llm.stream("hello", max_new_tokens=30, stop=stop)) == whole[: whole.index(stop)]


def test_a_chat_says_what_became_of_a_percentage(path, capsys, monkeypatch):
    import io

    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"})
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello there\nand again\n"))
    status, _, err = call(capsys, "--model", path, "--interactive", "--policy", "h2o:budget=50%", "-n", "4")
    assert status == 0 and err.count("percentages are of the first turn: h2o:budget=6") == 2


def test_the_token_that_ends_a_turn_of_the_chat_template_ends_an_answer(path, capsys, monkeypatch):
    """The model's files name no end of text, as with a base model whose template is one for chats."""
    template = "{% for m in messages %}{{ m.content }}MARK{% endfor %}"
    base = ["--model", path, "-p", "hello", "-n", "40", "--dtype", "float32"]

    def run(mark: str, *more: str) -> tuple[dict, str]:
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template.replace("MARK", mark)}))
        status, _, err = call(capsys, *base, *more, "--json", path / "o.json")
        assert status == 0, err
        return json.loads((path / "o.json").read_text()), err

    tok = Fast.from_file(str(path / "tokenizer.json"))
    for mark in (chr(i) for i in range(33, 127) if chr(i) not in "hello"):
        ids = run(mark, "--chat")[0]["token_ids"]
        if ord(mark) - 32 in ids[4:]:
            break
    at = ids.index(ord(mark) - 32)
    tok.add_special_tokens([mark])
    tok.save(str(path / "tokenizer.json"))
    record, err = run(mark, "--chat")
    assert record["finish_reason"] == "stop" and record["token_ids"] == ids[:at]
    assert f"the chat template ends a turn with {mark}, which the model's files do not name" in err
    record, err = run(mark, "--chat", "--ignore-eos")
    assert record["token_ids"] == ids and "ends a turn" not in err
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ord(mark) - 32}))
    record, err = run(mark, "--chat")
    assert record["finish_reason"] == "eos" and "ends a turn" not in err


def test_a_conversation_goes_on_behind_a_stop_that_is_a_special_token(path):
    """The stop is no part of the answer, so the next turn must not feed it a second time."""
    from nanokv.text.chat import Conversation

    answer = "".join(load(str(path), dtype="float32").stream("hi", max_new_tokens=60))
    mark = next(c for c in answer[5:] if c.isalpha() and c not in answer[:5] + "hi more")
    tok = Fast.from_file(str(path / "tokenizer.json"))
    tok.add_special_tokens([mark])
    tok.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}MARK{% endif %}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template.replace("MARK", mark)}))
    chat = Conversation(load(str(path), dtype="float32"), None, {"limit": 60, "stop": [mark]})
    list(chat.ask("hi"))
    assert chat.latest.reasons == ["stop"] and chat.latest.texts == [answer[: answer.index(mark)]]
    chat.finish()
    list(chat.ask("more"))
    said = chat.llm.tokenizer.encode("hi" + answer[: answer.index(mark)] + mark + "more")
    stopped, new = chat.latest.reasons == ["stop"], len(chat.latest.ids[0])
    assert chat.session.seen[0] == len(said) + new - (0 if stopped else 1)  # the last token is fed by the next turn


@pytest.mark.parametrize(("name", "value", "says"), [
    ("model.layers.1.mlp.down_proj.weight", float("inf"), r"the output of layers\.1\.mlp holds NaN or infinity .* its input was finite"),
    ("model.layers.0.self_attn.v_proj.weight", float("nan"), r"the output of layers\.0\.self_attn holds"),
    ("model.embed_tokens.weight", float("nan"), r"the output of embed_tokens holds"),
])  # fmt: skip
def test_while_debugging_the_first_layer_with_a_nan_is_named(name, value, says, path, monkeypatch):
    edit(path, lambda tensors: tensors[name].fill_(value))
    assert not logits(path).isfinite().all()  # otherwise only the logits tell
    monkeypatch.setenv("NANOKV_DEBUG", "1")
    with pytest.raises(ValueError, match=says):
        logits(path)
