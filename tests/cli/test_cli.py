"""generate.py as a user meets it: what goes where, the JSON, the REPL, and one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import ROOT, edit, first, reconfigure, shard

import generate
from nanokv import device
from nanokv import llm as llm_module

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def model(tiny, tmp_path):
    """A small checkpoint of one's own, with a chat template."""
    path = tmp_path / "m"
    shutil.copytree(tiny("g3")[0], path)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


def call(capsys, *argv: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of generate.py in this process."""
    try:
        status = generate.main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    out = capsys.readouterr()
    return status, out.out, out.err


def drop_tokenizer(path):
    (path / "tokenizer.json").unlink()


def outside(path):
    where = shard(path)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**where, "lm_head.weight": "../x.safetensors"}})
    )


def lose_shard(path):
    shard(path)
    (path / "b.safetensors").unlink()


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-10])


def to_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def latin1(path):
    (path / "prompt.txt").write_bytes("Käse".encode("latin-1"))


DAMAGE = [
    (lambda p: (p / "config.json").unlink(), "has no config.json"),
    (lambda p: (p / "model.safetensors").unlink(), "has no *.safetensors"),
    (drop_tokenizer, "neither tokenizer.json nor tokenizer.model"),
    (lambda p: reconfigure(p, architectures=["BertModel"]), "architecture BertModel is not supported"),
    (lambda p: reconfigure(p, rope_parameters={"rope_type": "yarn", "factor": 2.0}), "'yarn' is not supported"),
    (lambda p: edit(p, lambda t: t.pop("model.norm.weight")), "lacks 1 tensors, the first is model.norm.weight"),
    (lambda p: edit(p, lambda t: t.update(extra=t["model.norm.weight"].clone())), "holds 'extra'"),
    (
        lambda p: edit(p, lambda t: t.update({"lm_head.weight": t["model.norm.weight"].clone()})),
        "lm_head.weight has shape (96,)",
    ),
    (truncate, "is not a complete safetensors file"),
    (lose_shard, "lacks the shard b.safetensors"),
    (outside, "outside the model's directory"),
    (to_pickle, "only pickled weights"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
def test_a_damaged_model_gets_one_line_and_status_2(damage, says, model, capsys):
    damage(model)
    status, out, err = call(capsys, "--model", model, "-p", "hi")
    assert (status, out, err.count("\n")) == (2, "", 1) and says in err, err


ARGUMENTS = [
    (["--model", "lama2-7b", "-p", "x"], "unknown model 'lama2-7b' (did you mean llama2-7b"),
    (["--model", "MODEL/model.safetensors", "-p", "x"], "give the directory that holds it"),
    (["--model", "MODEL/x.bin", "-p", "x"], "pickled weights can run code"),
    (["--policy", "snapkw", "-p", "x"], "unknown policy 'snapkw' (did you mean snapkv"),
    (["--policy", "snapkv+int5", "-p", "x"], "unknown policy 'int5'"),
    (["--policy", "snapkv:windw=3", "-p", "x"], "no key 'windw' (did you mean window?)"),
    (["--policy", "snapkv:window=x", "-p", "x"], "it takes a whole number"),
    (["--policy", "snapkv+random", "-p", "x"], "both decide which tokens stay"),
    (["--policy", "snapkv:budget=8", "-p", "x"], "a head always keeps 32"),
    (["--policy", "simlayer", "-p", "x"], "simlayer:variant=light, which needs none"),
    (["--policy", "simlayer", "--kv-budget", "512", "-p", "x"], "takes no budget"),
    (["--policy", "snapkv:budget=64", "--kv-budget", "512", "-p", "x"], "say the same"),
    (["--policy", "snapkv", "--kv-budget", "1KiB", "-p", "x" * 300, "-n", "8"], "leaves 0 prompt tokens"),
    (["--policy", "snapkv", "--kv-budget", "many", "-p", "x"], "is no budget"),
    (["-p", ""], "the prompt is empty"),
    (["-p", "  \n"], "the prompt is empty"),
    ([], "no prompt; give -p TEXT"),
    (["-p", "x", "--question", ""], "--question is empty"),
    (["-p", "x" * 600], "more than the 512 of this model's context"),
    (["-p", "x" * 500, "-n", "13"], "500 tokens of prompt and 13 new ones"),
    (["-p", "x", "--prompt-file", "y"], "both given"),
    (["--prompt-file", "MODEL/prompt.txt"], "is not UTF-8 (byte 1)"),
    (["--prompt-file", "MODEL/absent.txt"], "cannot be read (No such file or directory)"),
    (["-p", "x", "-n", "0"], "--max-new-tokens is 0"),
    (["-p", "x", "--chunk", "0"], "--chunk is 0"),
    (["-p", "x", "--temperature", "-1"], "temperature is -1"),
    (["-p", "x", "--top-p", "2"], "top-p is 2"),
    (["-p", "x", "--num-samples", "3"], "give --temperature 0.8"),
    (["-p", "x", "--json", "-"], "standard output carries the text"),
    (["-p", "x", "--json", "MODEL/no/x.json"], "there is no directory"),
    (["-p", "x", "--device", "abacus"], "unknown device 'abacus'; devices are"),
    (["-p", "x", "--device", "cuda:9"], "device 'cuda:9' cannot be used here"),
    (["-p", "x", "--device", "meta"], "unknown device 'meta'"),
    (["-p", "x", "--json", "MODEL"], "cannot be written"),
    (["-p", "x", "--stop", ""], "--stop is empty"),
    (["-p", "x", "--seed", "-1"], "seed is -1"),
    (["-p", "x", "--seed", "99999999999999999999"], "give a whole number from 0 to 2^63"),
    (["--policy", "snapkv", "--kv-budget", "infMiB", "-p", "x"], "is no budget"),
    (["--policy", "streaming:recent=100", "--kv-budget", "20", "-p", "x"], "say the same"),
    (["--policy", "streaming:recent=10000000000000", "-p", "x"], "is out of range; give less than 2^31"),
    (["--policy", "random:window=0,budget=0", "-p", "x"], "window ≥ 1"),
    (["--model", "a" * 300, "-p", "x"], "unknown model 'aaaa"),
    (["--prompt-file", ""], "--prompt-file is empty"),
    (["-p", "x", "--dtype", "int3"], "unknown dtype 'int3'"),
    (["-p", "x", "--backend", "cudnn"], "invalid choice: 'cudnn'"),
    (["-p", "x", "--frobnicate"], "unknown option --frobnicate; --help lists all options"),
    (["-p", "x", "--kv_budgt=5"], "unknown option --kv_budgt; did you mean --kv-budget"),
    (["-p", "two", "words"], "'words' belongs to no option; a text with spaces needs quotes"),
    (["--random-weights", "-p", "x"], "no known shape"),
    (["--interactive", "--question", "x"], "leave out --question"),
    (["-p", "x", "--beams", "0"], "--beams is 0; give at least 1"),
    (["-p", "x", "--beams", "2", "--draft", "lookup"], "--beams searches for one text; leave out --draft"),
    (["-p", "x", "--draft", "lokup"], "unknown draft 'lokup' (did you mean lookup?); give lookup, or a plan"),
    (["--interactive", "--draft", "lookup", "--policy", "streaming"], "cannot check drafts: it evicts a token"),
    (["-p", "x", "--draft", "lookup", "--policy", "full+int4"], "cannot check drafts: it rounds every token"),
    (["--plan", "--draft", "lookup"], "leave out --draft"),
    (["--plan", "-p", "x"], "--plan reckons with a full context; leave out --prompt"),
    (["--plan", "--kv-budget", "300%"], "budget=300% is too small or out of range"),
    (["-p", "x", "--policy", "int8", "--k-bits", "2"], "--k-bits and the store int8 both say how many bits"),
    (["-p", "x", "--policy", "int4:group=7"], "no part of group=7 divides"),
    (["-p", "x", "--draft-tokens", "4"], "--draft-tokens is of a draft"),
    (["-p", "x", "--beams", "2", "--explain"], "leave out --explain"),
    (["-p", "x", "--draft", "h2o"], "h2o+dense cannot write drafts: it scores its tokens at every step"),
    (["-p", "x", "--draft", "lookup", "--policy", "streaming"], "cannot check drafts: it evicts a token at every step"),
    (["-p", "x", "--draft", "lookup", "--draft-model", "MODEL"], "--draft lookup needs no model"),
    (["-p", "x", "--draft-tokens", "3"], "--draft-tokens is of a draft, and there is none"),
    (["-p", "x", "--draft", "lookup", "--draft-tokens", "0"], "--draft-tokens is 0"),
    (["-p", "x", "--draft", "lookup", "--num-samples", "2", "--temperature", "1"], "leave out --num-samples"),
]


@pytest.mark.parametrize(("argv", "says"), ARGUMENTS)
def test_a_wrong_argument_gets_one_line_and_status_2(argv, says, model, capsys):
    latin1(model)
    (model / "x.bin").write_bytes(b"")
    argv = [a.replace("MODEL", str(model)) for a in argv]
    status, out, err = call(capsys, *(() if "--model" in argv else ("--model", model)), "--quiet", *argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and says in err, err


def test_a_model_without_a_template_cannot_chat(tiny, capsys):
    status, _, err = call(capsys, "--model", tiny("g3")[0], "--chat", "-p", "x", "--quiet")
    assert status == 2 and "has no chat template" in err and err.count("\n") == 1


def test_too_little_memory_says_what_would_fit(model, capsys, monkeypatch):
    monkeypatch.setattr(device, "free_bytes", lambda device: 300 * 2**20)
    status, _, err = call(capsys, "--model", "llama2-13b", "--random-weights", "--dtype", "float16", "-p", "x")
    assert (
        status == 2 and "llama2-13b needs 24.24 GiB in float16 and 300.0 MiB are free" in err and "smollm2-135m" in err
    )
    monkeypatch.setattr(device, "free_bytes", lambda device: 2**30)  # enough for the weights, not for the cache
    monkeypatch.setattr(llm_module, "free_bytes", lambda device: 2**18)
    status, _, err = call(capsys, "--model", model, "--quiet", "-p", "x" * 450, "-n", "9", "--dtype", "float32")
    assert status == 2 and "are free; about" in err and err.count("\n") == 1


def test_debug_shows_the_traceback(model, monkeypatch):
    monkeypatch.setenv("NANOKV_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown policy"):
        generate.main(["--model", str(model), "--policy", "nope", "-p", "x"])


def test_stdout_is_the_text_and_nothing_else(model, capsys):
    status, out, err = call(capsys, "--model", model, "-p", "hello", "-n", "9", "--json", model / "o.json")
    result = json.loads((model / "o.json").read_text())
    assert status == 0 and out == result["text"] + "\n" and len(result["token_ids"]) == 9
    for part in (
        "full+dense",
        "load ",
        "prefill 5 tok",
        "decode 7 tok",
        "peak memory",
        "kv: ",
        "backend sdpa",
        "runner eager",
    ):
        assert part in err
    assert call(capsys, "--model", model, "-p", "hello", "-n", "9", "--quiet") == (0, out, "")


def test_the_json_is_the_contracts(model, capsys):
    file = model / "o.json"
    call(
        capsys,
        "--model",
        model,
        "-p",
        "x" * 60,
        "-n",
        "5",
        "--json",
        file,
        "--policy",
        "snapkv:window=4,budget=20",
        "--dtype",
        "fp32",
    )
    r = json.loads(file.read_text())
    assert r["policy"].startswith("snapkv:budget=20,") and r["policy"].endswith(
        "window=4,kernel=7,pool=max,group=mean+dense"
    )
    assert (r["prompt_tokens"], r["new_tokens"], r["finish_reason"], r["device"]) == (60, 5, "length", "cpu")
    assert (
        r["dtype"] == {"prefill": "float32", "decode": "float32"} and r["backend"] == "sdpa" and r["runner"] == "eager"
    )
    for key in (
        "model",
        "torch",
        "commit",
        "text",
        "load_s",
        "compile_s",
        "prefill_s",
        "decode_s",
        "prefill_tok_s",
        "decode_tok_s",
    ):
        assert key in r
    cache = r["cache"]
    assert cache["bytes"] == sum(x["bytes"] for x in cache["layers"]) and cache["host_bytes"] == 0
    assert (
        cache["ratio"] == cache["full_bytes"] / cache["bytes"]
        and 0 < cache["live_bytes"] <= cache["bytes"] < r["peak_bytes"]
    )
    assert cache["layers"][1] == {
        **cache["layers"][1],
        "layer": 1,
        "owner": 1,
        "kept": [24, 24],
        "k_bits": 32,
        "v_bits": 32,
    }


def test_samples_are_rows_and_a_seed_repeats_them(model, capsys):
    argv = [
        "--model",
        model,
        "-p",
        "hello",
        "-n",
        "6",
        "--num-samples",
        "3",
        "--temp",
        "1.5",
        "--json",
        model / "o.json",
        "--quiet",
    ]
    first, again = call(capsys, *argv, "--seed", "5"), call(capsys, *argv, "--seed", "5")
    rows = json.loads((model / "o.json").read_text())["rows"]
    assert all(r["prompt_tokens"] == 5 and r["cache"]["layers"][0]["kept"] == [10, 10] for r in rows)
    assert (
        first == again
        and first[1] == "\n\n".join(r["text"] for r in rows) + "\n"
        and len({r["text"] for r in rows}) > 1
    )
    assert call(capsys, *argv, "--seed", "6") != first


def test_a_stop_text_ends_before_itself(model, capsys):
    _, whole, _ = call(capsys, "--model", model, "-p", "hello", "-n", "30", "--quiet", "--dtype", "float32")
    stop = whole[11:14]
    argv = [
        "--model",
        model,
        "-p",
        "hello",
        "-n",
        "30",
        "--stop",
        stop,
        "--json",
        model / "o.json",
        "--dtype",
        "float32",
    ]
    _, out, _ = call(capsys, *argv)
    assert out == whole[: whole.index(stop)] + "\n"
    assert json.loads((model / "o.json").read_text())["finish_reason"] == "stop"


def test_underscores_aliases_and_standard_input_are_accepted(model, capsys, monkeypatch):
    _, out, _ = call(capsys, "--model", model, "-p", "hello", "-n", "6", "--quiet")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert call(capsys, "--model", model, "--prompt", "-", "--max_tokens", "6", "--quiet")[1] == out
    (model / "p.txt").write_text("hello")
    assert call(capsys, "--model", model, f"--prompt_file={model / 'p.txt'}", "--max-new-tokens=6", "--quiet")[1] == out


def test_chunks_say_what_they_cost_and_change_nothing(model, capsys):
    argv = [
        "--model",
        model,
        "-p",
        "hello " * 20,
        "-n",
        "8",
        "--policy",
        "snapkv:window=4,budget=30",
        "--dtype",
        "float32",
    ]
    _, whole, _ = call(capsys, *argv)
    _, parts, err = call(capsys, *argv, "--chunk", "7")
    assert parts == whole and "prefilled in chunks, so the whole prompt's cache was alive at once" in err


def test_a_policy_with_nothing_to_evict_says_so(model, capsys):
    _, _, err = call(capsys, "--model", model, "-p", "hello", "-n", "4", "--policy", "snapkv")
    assert "snapkv had nothing to evict: every layer still holds all 8 tokens" in err
    _, _, err = call(capsys, "--model", model, "-p", "hello" * 9, "-n", "4", "--policy", "snapkv:window=4,budget=20")
    assert "nothing to evict" not in err


def test_a_store_that_finds_too_few_chunks_says_so(model, capsys):
    _, _, err = call(capsys, "--model", model, "-p", "hello", "-n", "4", "--policy", "shadow")
    assert "shadow: 5 tokens are too few for chunks to choose from, so all stay exact" in err
    fits = "shadow:chunk=2,local=1,outliers=1,budget=4"
    _, _, err = call(capsys, "--model", model, "-p", "hello" * 9, "-n", "4", "--policy", fits)
    assert "too few" not in err and "host 0 B" not in err


def test_a_question_follows_on_the_compressed_cache(model, capsys):
    base = [
        "--model",
        model,
        "-n",
        "5",
        "--policy",
        "streaming:sink=2,recent=6",
        "--json",
        model / "o.json",
        "--dtype",
        "float32",
    ]
    _, asked, _ = call(capsys, *base, "-p", "x" * 40, "--question", "and y?")
    report = json.loads((model / "o.json").read_text())
    assert report["prompt_tokens"] == 46 and report["cache"]["layers"][0]["kept"] == [8, 8]
    _, joined, _ = call(capsys, *base, "-p", "x" * 40 + "and y?")
    assert asked != joined  # the question saw the compressed prompt only
    full = ["--model", model, "-n", "5", "--dtype", "float32", "--quiet"]
    assert (
        call(capsys, *full, "-p", "x" * 40, "--question", "and y?")[1]
        == call(capsys, *full, "-p", "x" * 40 + "and y?")[1]
    )


@pytest.mark.parametrize("question", ["What is it?", "assistant"])  # the second stands in the template's tail, too
def test_a_chat_question_is_cut_out_of_one_rendering(question, model):
    from nanokv import load
    from nanokv.text.chat import split_at_question

    llm = load(str(model), dtype="float32")
    before, after = split_at_question(llm, [{"role": "user", "content": "Some text."}], question)
    assert llm.tokenizer.decode(before) == "<user>Some text.\n\n"
    assert llm.tokenizer.decode(after) == question + "</user>\n<assistant>"


def test_a_conversation_feeds_only_what_is_new(model):
    from nanokv import load
    from nanokv.text.chat import Conversation

    llm = load(str(model), dtype="float32")
    chat = Conversation(llm, "be brief", {"limit": 6})
    sessions = []
    for line in ("hi", "more?", "again?"):
        answer = "".join(piece for _, piece in chat.ask(line))
        chat.finish()
        sessions.append(chat.session)
        rendered = llm.tokenizer.encode(llm.tokenizer.chat(chat.messages[:-1]), special=False)
        assert (
            chat.session.seen[0] == len(rendered) + 5
        )  # all but the answer's last token, which the next turn feeds first
    assert all(s is sessions[0] for s in sessions) and chat.messages[-1] == {"role": "assistant", "content": answer}
    whole = llm.session(6)
    ids = llm.tokenizer.encode(llm.tokenizer.chat(chat.messages[:-1]), special=False)
    again = "".join(p for _, p in llm.answer(whole, [ids], limit=6))
    assert again == answer  # under the full cache, turn by turn and all at once are the same


def test_the_repl_has_its_commands(model, capsys, monkeypatch):
    lines = "hi\n/stats\n/policy\n/policy streaming:sink=2,recent=8\nmore\n/stats\n/reset\n/stats\n/what\n/policy nope\n/exit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status, out, err = call(capsys, "--model", model, "--interactive", "-n", "5")
    assert status == 0 and out.count("\n") == 2
    for part in (
        "kv: ",
        "full+dense",
        "kept 10/",
        "nothing is cached yet",
        "unknown command /what",
        "unknown policy 'nope'",
        "forgotten",
    ):
        assert part in err


def test_a_turn_beyond_the_context_is_told_from_the_text_before_it(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n" + "x" * 600 + "\nhi\n"))
    status, out, err = call(capsys, "--model", model, "--interactive", "-n", "5")
    assert status == 0 and out.count("\n") == 2  # the two short turns are answered
    assert re.search(r"a text of \d+, 6\d\d more and 5 new ones are more than the 512 of this model's context", err)
    assert "begin anew, or go on regardless with --allow-overflow" in err


@pytest.mark.parametrize(
    "draft", first(2, [["--draft", "lookup"], ["--draft-model"], ["--draft", "streaming:sink=2,recent=8"]])
)
def test_a_draft_changes_no_text(draft, model, tmp_path, capsys, monkeypatch):
    draft = [*draft, str(model)] if draft == ["--draft-model"] else draft
    base, file = ["--model", model, "-p", "one two three, one two three, one", "-n", "20"], tmp_path / "x.json"
    _, right, _ = call(capsys, *base)
    status, out, err = call(capsys, *base, *draft, "--json", file)
    assert (status, out) == (0, right) and "drafts by " in err
    record = json.loads(file.read_text())["draft"]
    assert 0 <= record["accepted"] <= record["drafted"] and record["passes"] > 0
    chats = []
    for more in ([], draft):  # with other plans in between, of which one cannot check drafts
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\nhi\n/policy snapkv\nhi\n/reset\nhi\n/exit\n"))
        status, out, _ = call(capsys, "--model", model, "--interactive", "-n", "9", *more)
        chats.append((status, out))
    assert chats[0] == chats[1] and chats[0][0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/policy h2o\nhi\n/policy\n/exit\n"))
    # in fp32, where the two replies hold no newline of their own
    status, out, err = call(capsys, "--model", model, "--dtype", "fp32", "--interactive", "-n", "9", *draft)
    assert out.count("\n") == 2 and "h2o+dense cannot check drafts" in err and err.count("drafts by ") == 2


def test_beams_write_one_text(model, tmp_path, capsys):
    base = ["--model", model, "-p", "x" * 70, "-n", "9", "--policy", "snapkv:budget=40,window=4"]
    status, out, err = call(capsys, *base, "--beams", "3", "--json", tmp_path / "x.json")
    record = json.loads((tmp_path / "x.json").read_text())
    assert status == 0 and record["text"] + "\n" == out and record["new_tokens"] == 9 and "rows" not in record
    assert "what stays of the first 70 once for 3 rows" in err


def test_a_draft_of_other_tokens_is_refused(llm_of, model):
    tokens = json.loads((model / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {"a": 1, "!": 65}
    (model / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match="splits texts into other tokens"):
        llm_of("g3").speculation("full", writer=llm_module.load(str(model)))


def test_explain_draws_every_layer(model, capsys):
    _, _, err = call(
        capsys, "--model", model, "-p", "x" * 100, "-n", "4", "--policy", "streaming:sink=4,recent=12", "--explain"
    )
    lines = [line for line in err.splitlines() if line.startswith("layer")]
    assert len(lines) == 3 and all("16  |██" in line and line.rstrip().endswith("█|") for line in lines)


def test_lists_print_every_name(capsys):
    from nanokv.cache.plan import AXES
    from weights.registry import MODELS

    status, out, _ = call(capsys, "--list-policies")
    assert (
        status == 0
        and all(f"  {name}" in out for parts in AXES.values() for name in parts)
        and "arXiv:2404.14469" in out
    )
    status, out, _ = call(capsys, "--list-models")
    assert status == 0 and all(name in out for name in MODELS)


def test_a_part_is_explained_with_its_options(capsys):
    status, out, _ = call(capsys, "--list-policies", "adakv")
    assert out.startswith("adakv (keep, nanokv/policies/snapkv.py, the same as snapkv:heads=ada)")
    assert status == 0 and "arXiv:2404.14469" in out
    assert re.search(r"^  heads=ada +flat, or ada: ", out, re.M) and re.search(r"^  window=32 +queries of", out, re.M)
    status, out, err = call(capsys, "--list-policies", "snapk")
    assert status == 2 and not out and "did you mean snapkv" in err and err.count("\n") == 1


def test_backends_are_explained(model, capsys):
    """Calls per operation, counted by hand: 3 layers, one prompt, 3 steps."""
    base = ["--model", model, "-p", "hello", "-n", "4", "--ignore-eos", "--dtype", "float32", "--explain-backends"]
    status, _, err = call(capsys, *base)
    rows = {
        line.split()[0]: line.split()[1:4]
        for line in err.splitlines()
        if line.count("nanokv.") or line.count("kernels.")
    }
    assert status == 0
    assert rows["prefill"] == ["cpu", "3", "nanokv.backends.torch_cpu.sdpa_prefill"]
    assert rows["decode"] == ["cpu", "9", "nanokv.backends.torch_cpu.sdpa_decode"]
    assert rows["linear"][1] == str(
        (3 * 4 + 1) * 4
    )  # four products per layer and the head, once for the prompt and per step
    assert "_scaled_dot_product_flash_attention_for_cpu x3)" in err
    status, _, err = call(capsys, *base, "--backend", "eager")
    assert status == 0 and "kernels.reference.decode" in err and "flash" not in err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--compile-mode", "max-autotune"], "compile options are for --runner compile"),
        (["--runner", "compile", "--compile-option", "max_autotun=true"], "did you mean max_autotune"),
        (["--runner", "compile", "--compile-option", "max_autotune"], "no KEY=VALUE pair"),
        (
            ["--runner", "compile", "--compile-option", "epilogue_fusion=no"],
            "epilogue_fusion is a bool, and 'no' is a str",
        ),
        (
            ["--runner", "compile", "--compile-backend", "eager", "--compile-option", "max_autotune=true"],
            "leave one of them out",
        ),
    ],
)
def test_compile_flags_that_cannot_work_are_told(flags, reason, model, capsys):
    status, out, err = call(capsys, "--model", model, "-p", "hello", *flags)
    assert status == 2 and not out and reason in err and err.count("\n") == 1


def test_every_option_of_every_part_has_a_meaning():
    from nanokv.cache.plan import AXES
    from nanokv.inspect.parts import explain_part, option_meanings

    for parts in AXES.values():
        for name, part in parts.items():
            assert set(option_meanings(type(part))) == {f.name for f in fields(part)}, name
            assert explain_part(name)


def test_random_weights_run_a_named_shape_without_files(capsys):
    status, out, err = call(
        capsys, "--model", "smollm2-135m", "--random-weights", "-p", "hello", "-n", "3", "--dtype", "bf16"
    )
    assert status == 0 and out and "random weights" in err


def start(*argv: object, **more) -> subprocess.Popen:
    command = [sys.executable, "-u", str(ROOT / "generate.py"), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env, **more
    )


def test_ctrl_c_ends_with_what_was_generated(model):
    reconfigure(model, max_position_embeddings=100000)
    p = start("--model", model, "-p", "hello", "-n", "90000", "--json", model / "o.json", "--dtype", "float32")
    first = os.read(p.stdout.fileno(), 3).decode()  # past the file object, whose buffer `communicate` would not see
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    result = json.loads((model / "o.json").read_text())
    assert p.returncode == 130 and result["finish_reason"] == "interrupted" and first + out == result["text"] + "\n"
    assert "kv: " in err and "Traceback" not in err


def test_a_closed_pipe_ends_quietly(model):
    reconfigure(model, max_position_embeddings=100000)
    p = start("--model", model, "-p", "hello", "-n", "90000", "--quiet", "--dtype", "float32")
    p.stdout.read(3)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(timeout=60) == 0 and err == ""


def test_a_policy_that_waits_decides_even_if_one_token_was_asked_for(model, capsys):
    argv = [
        "--model",
        model,
        "-p",
        "x" * 60,
        "-n",
        "1",
        "--policy",
        "simlayer:variant=decode,threshold=0,sink=2,recent=9",
    ]
    status, out, err = call(capsys, *argv, "--json", model / "o.json", "--explain")
    assert status == 0 and len(out) == 2 and "kept 11/61 tokens in 3/3 layers" in err and "layer   2" in err
    assert json.loads((model / "o.json").read_text())["cache"]["layers"][0]["kept"] == [11, 11]


def test_an_answer_that_is_interrupted_leaves_a_cache_that_goes_on(model):
    from nanokv import load
    from nanokv.text.chat import Conversation

    llm = load(str(model), dtype="float32")
    for broken in (False, True):
        chat = Conversation(llm, None, {"limit": 9})
        turn = chat.ask("hi")
        for n, _ in enumerate(turn):
            turn.interrupted = turn.interrupted or (broken and n == 3)
        chat.finish()
        assert turn.reasons == (["interrupted"] if broken else ["length"]) and len(turn.ids[0]) == (4 if broken else 9)
        told = "".join(p for _, p in chat.ask("more?"))
        ids = llm.tokenizer.encode(llm.tokenizer.chat(chat.pending), special=False)
        anew = "".join(p for _, p in llm.answer(llm.session(9), [ids], limit=9))
        assert told == anew


def test_a_step_that_dies_half_way_is_noticed(model, monkeypatch):
    from nanokv import load
    from nanokv.cache.decode import Owner

    llm = load(str(model), dtype="float32")
    session = llm.session(9)
    turn = llm.answer(session, [[1, 2, 3]], limit=5)
    calls = iter(range(100))
    attend = Owner.attend

    def dies(self, *args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return attend(self, *args)

    monkeypatch.setattr(Owner, "attend", dies)
    with pytest.raises(KeyboardInterrupt):
        list(turn)
    assert not session.intact


def test_a_ring_takes_no_more_than_the_text_can_fill(model, capsys):
    call(capsys, "--model", model, "-p", "hello", "-n", "4", "--policy", "streaming", "--json", model / "o.json")
    cache = json.loads((model / "o.json").read_text())["cache"]
    assert cache["bytes"] < 2 * cache["full_bytes"]


def test_a_turn_needs_something_to_go_on_with(model):
    from nanokv import load

    llm = load(str(model), dtype="float32")
    with pytest.raises(ValueError, match="a new session begins with prompts"):
        llm.answer(llm.session(3), [])


def test_a_saved_cache_goes_on_like_the_prompt_it_was(model, capsys):
    base = ["--model", model, "-n", "6", "--dtype", "float32", "--quiet"]
    for policy in (
        "full",
        "snapkv:window=4,budget=20",
        "streaming:sink=2,recent=9",
        "simlayer:variant=light,recent=10,full=1",
    ):
        plan = ["--policy", policy]
        asked = call(capsys, *base, *plan, "-p", "x" * 60, "--question", "and y?")
        assert call(capsys, *base, *plan, "-p", "x" * 60, "--save-cache", model / "c")[0] == 0
        assert call(capsys, *base, "--load-cache", model / "c", "-p", "and y?") == asked


def test_a_saved_chat_goes_on_in_the_chat_template(model, capsys):
    from nanokv import load
    from nanokv.save import place_of
    from nanokv.text.chat import encode_later

    base = ["--model", model, "-n", "6", "--dtype", "float32", "--quiet"]
    chat = ["--policy", "snapkv:window=4,budget=20", "-p", "x" * 60, "--chat"]
    asked = call(capsys, *base, *chat, "--question", "and y?")
    assert call(capsys, *base, *chat, "--question", "and z?", "--save-cache", model / "c")[0] == 0
    assert call(capsys, *base, "--load-cache", model / "c", "-p", "and y?", "--save-cache", model / "d") == asked
    assert call(capsys, *base, *chat, "--save-cache", model / "e")[0] == 0
    assert [place_of(model / name) for name in "cde"] == ["question", "answer", "answer"]
    llm = load(str(model), dtype="float32")
    new = {place: llm.tokenizer.decode(encode_later(llm, "Why?", place)) for place in ("question", "answer", None)}
    ends = "Why?</user>\n<assistant>"
    assert new["question"] == ends and new["answer"].endswith(f"<user>{ends}") and new[None] == "Why?"
    assert new["answer"].removesuffix(f"<user>{ends}").startswith("</assistant>")


def test_a_saved_cache_that_does_not_fit_is_refused(model, tiny, capsys):
    call(capsys, "--model", model, "-p", "x" * 60, "-n", "1", "--save-cache", model / "c", "--quiet")
    other = ["--model", tiny("llama31")[0], "--load-cache", model / "c", "-p", "x", "--quiet"]
    assert f"was saved with the model {str(model)!r}; give that one as --model" in call(capsys, *other)[2]
    data = (model / "c").read_bytes()
    for bad in (data[:-9], data[:50], b"", (model / "model.safetensors").read_bytes()):
        (model / "c").write_bytes(bad)
        status, _, err = call(capsys, "--model", model, "--load-cache", model / "c", "-p", "x", "--quiet")
        assert status == 2 and "is no complete saved cache" in err and err.count("\n") == 1
    wait = ["--policy", "simlayer:variant=decode,threshold=0", "--save-cache", model / "d", "-p", "x" * 60]
    assert "nothing to save yet" in call(capsys, "--model", model, "--quiet", *wait)[2] and not (model / "d").exists()


def test_a_saved_cache_that_is_not_there_is_told_before_the_model_is_loaded(model, capsys, monkeypatch):
    monkeypatch.setattr("nanokv.load", lambda *args, **given: pytest.fail("the model is loaded"))
    for name in ("nothing", "x" * 300):
        status, _, err = call(capsys, "--model", model, "--load-cache", model / name, "-p", "x")
        assert status == 2 and "is not there; give a file that --save-cache has written" in err


def test_the_xray_darkens_what_is_remembered(model, capsys):
    file = model / "x.html"
    call(
        capsys,
        "--model",
        model,
        "-p",
        "<b>" + "x" * 57,
        "-n",
        "2",
        "--policy",
        "streaming:sink=1,recent=9",
        "--xray",
        file,
    )
    page = file.read_text()
    assert page.count("color:rgb(215,215,215)") == 61 - 10 and page.count("color:rgb(0,0,0)") == 10 and "&lt;" in page
    assert "layers 0, 1, 2" in page and "layers none" in page


def test_a_plan_is_made_before_anything_is_loaded(capsys):
    status, out, _ = call(capsys, "--model", "llama3-8b", "--plan", "--policy", "snapkv:budget=25%", "-n", "192")
    lines = {line.split("  ")[0].split(" ")[0]: line for line in out.splitlines()}
    assert status == 0 and "at most    2000 tokens" in lines["snapkv:budget=25%"] and "8000 tokens of prompt" in out
    assert set(lines) >= {"full", "random", "streaming", "snapkv", "simlayer"}
    assert "knows no threshold" in call(capsys, "--model", "tinyllama-1.1b", "--plan")[1]
    status, out, _ = call(
        capsys, "--model", "llama3-8b", "--plan", "--policy", "kvzip", "--kv-budget", "2000", "-n", "192"
    )
    assert status == 0 and [line.split()[3] for line in out.splitlines() if line.startswith("kvzip ")] == ["2000"]
    out = call(capsys, "--model", "llama3-8b", "--plan", "--kv-budget", "100", "-n", "192")[1]
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert all("at most     100 tokens" in rows[name] for name in ("snapkv", "streaming", "h2o"))
    assert "at most    8000 tokens" in rows["full"] and "give at least 138 tokens" in rows["scissorhands"]
    assert rows["kvzip"].endswith("its scoring passes need a shorter prompt")
    status, _, err = call(capsys, "--model", "llama3-8b", "--plan", "-n", "9000")
    assert status == 2 and "no room for a prompt in this model's context of 8192" in err


def test_compare_says_how_far_the_answer_is_from_another_plans(model, capsys, tmp_path):
    file, prompt = tmp_path / "o.json", "one two three four five six seven " * 9
    base = ["--model", model, "--dtype", "float32", "-p", prompt, "-n", 12, "--ignore-eos", "--json", file]
    status, out, err = call(capsys, *base, "--compare", "full")
    same = json.loads(file.read_text())["compare"]
    assert status == 0 and "compared with full" in err and "same greedy choice everywhere" in err
    assert (
        same["kl_mean"] == 0 and same["top1"] == 1 and same["first"] is None and same["tokens"] == 11
    )  # the first is the prompt's own
    _, _, err = call(capsys, *base, "--policy", "random:budget=40,window=4", "--compare", "full")
    far = json.loads(file.read_text())
    assert far["compare"]["kl_mean"] > 1e-3 and far["compare"]["ppl_reference"] == same["ppl"]
    # where greedy first departs is where the two texts part
    full = json.loads((call(capsys, *base), file.read_text())[1])
    parted = next((i for i, (a, b) in enumerate(zip(far["token_ids"], full["token_ids"], strict=True)) if a != b), None)
    assert far["compare"]["first"] == parted and parted is not None
    assert "compare" not in full
    status, _, err = call(
        capsys, *base, "--policy", "streaming:recent=20", "--question", " and then?", "--compare", "full"
    )
    assert status == 0 and "compared with full" in err
    status, out, err = call(capsys, *base, "--compare", "fulll")
    assert status == 2 and "did you mean full" in err and not out
    assert call(capsys, *base, "--compare", "full", "--num-samples", 2, "--temperature", 1)[0] == 2


def test_layers_that_share_are_found_and_their_map_used_again(model, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOKV_WEIGHTS", str(tmp_path))
    argv = ["--model", model, "-p", "x" * 60, "-n", "3", "--dtype", "fp32", "--policy"]
    status, out, err = call(capsys, *argv, "snapkv:budget=20,window=4+kvsharer:layers=1,threshold=-1", "--explain")
    assert status == 0 and "reads layer" in err and "+kvsharer:layers=1,map=none,threshold=-1" in err
    assert len(list((tmp_path / "maps").iterdir())) == 1
    assert call(capsys, *argv, "snapkv:budget=20,window=4+kvsharer:layers=1,threshold=-1", "--quiet") == (0, out, "")
    status, out, err = call(capsys, *argv, f"kvsharer:map={tmp_path / 'none.json'}")
    assert (status, out, err.count("\n")) == (2, "", 1) and "is no map of shared layers" in err
    status, out, err = call(capsys, "--model", model, "--plan", "--policy", "kvsharer:layers=1")
    assert status == 0 and "kvsharer:layers=1" in out


def test_a_text_may_run_far_past_the_context(model, capsys):
    argv = [
        "--model",
        model,
        "-p",
        "x" * 60,
        "-n",
        "700",
        "--dtype",
        "fp32",
        "--policy",
        "streaming:budget=64,positions=cache",
    ]
    status, _, err = call(capsys, *argv, "--ignore-eos")
    assert status == 2 and "--allow-overflow" in err
    status, _, err = call(capsys, *argv, "--ignore-eos", "--allow-overflow")
    assert status == 0 and "decode" in err and "kept 64/7" in err
