"""What may stand where a model's file should: pipes, folders, links to nowhere, files of absurd sizes, and values that no
file should hold.
"""

from __future__ import annotations

import json
import os
import signal
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fuzz.gguf_parts import _places, write_gguf
from fuzz.templates import CONVERSATION, HOSTILE
from helpers import edit, every, reconfigure, shard
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import text, write_seeded

from nanokv import load, parse, save
from nanokv.files import MAX_JSON
from nanokv.text.template import MAX_LENGTH, Renderer

RENDERER, QUICK_RENDERER = Renderer(), Renderer(seconds=0.3)
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
)


@pytest.fixture(autouse=True)
def never_hang():
    """Reading a pipe that nobody writes to would wait forever."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.fixture
def path(tmp_path):
    write_seeded(tmp_path / "m", architectures=["LlamaForCausalLM"])
    return tmp_path / "m"


def refusal(path) -> str:
    with pytest.raises(ValueError) as e:
        load(str(path), dtype="float32")
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000
    return str(e.value)


def pipe(file):
    os.mkfifo(file)


def nowhere(file):
    file.symlink_to(file.parent / "not-there")


def circle(file):
    file.symlink_to(file)


def device(file):
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "says"),
    [(pipe, "regular"), (os.mkdir, "regular"), (device, "regular"), (nowhere, "a link to"), (circle, "cannot be read")],
)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_and_not_taken_for_absent(name, make, says, path):
    if name == "model.safetensors.index.json":
        shard(path)
    (path / name).unlink(missing_ok=True)
    make(path / name)
    assert says in refusal(path)


@pytest.mark.parametrize("make", [pipe, os.mkdir, nowhere])
def test_a_shard_that_is_no_file_is_refused(make, path):
    shard(path)
    (path / "b.safetensors").unlink()
    make(path / "b.safetensors")
    assert "b.safetensors" in refusal(path)
    (path / "model.safetensors.index.json").unlink()  # now all shards count
    assert "b.safetensors" in refusal(path)


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "\x00.safetensors", "\ud800.safetensors"])
def test_an_index_may_name_what_no_file_can_be_called(name, path):
    where = shard(path)
    table = {tensor: name if file == "a.safetensors" else file for tensor, file in where.items()}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert refusal(path)


def test_an_id_of_minus_one_is_none(path):
    reconfigure(path, bos_token_id=-1, eos_token_id=[-1, 5])
    llm = load(str(path), dtype="float32")
    assert (llm.config.bos_token_id, llm.tokenizer.eos) == (None, (5,))


def test_a_link_to_a_file_is_a_file(path, tmp_path):
    """As in the hub library's cache."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
    load(str(path), dtype="float32")


def test_json_has_a_largest_size(path):
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text + " " * (MAX_JSON - len(text)))
    load(str(path), dtype="float32")
    (path / "config.json").write_text(text + " " * MAX_JSON)
    assert "at most 16 are read" in refusal(path)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
        ({"vocab_size": 2**30}, "does it belong to another model"),
        ({"intermediate_size": 2**30}, "does it belong to another model"),
        ({"architectures": {"a": 1}}, "architectures is {'a': 1}"),
        ({"architectures": [["LlamaForCausalLM"]]}, "must be a list of names"),
        ({"architectures": "x" * 5000}, "must be a list of names"),
        ({"eos_token_id": True}, "token id True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e25, "original_max_position_embeddings": 512}}, "2^31"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_values_that_no_config_should_have(values, says, path):
    reconfigure(path, **values)
    assert says in refusal(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", {"bos_token": ["<s>"]}, "['<s>'] is no token"),
        ("tokenizer_config.json", {"eos_token": {"content": 3}}, "{'content': 3} is no token"),
        ("tokenizer_config.json", {"add_bos_token": "false"}, "add_bos_token is 'false'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<s>"}}}, "the id 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<s>"]}, "it must hold tokens"),
        ("tokenizer_config.json", {"bos_token": "x" * 20_000}, "is no token"),
        ("added_tokens.json", {"<s>": -1}, "the id -1"),
        ("added_tokens.json", {"<s>": "²"}, "the id '²'"),
        ("added_tokens.json", {"<s>": True}, "the id True"),
        ("special_tokens_map.json", {"pad_token": 1, "bos_token": [1]}, "[1] is no token"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_tokens_that_are_none(name, content, says, path):
    (path / name).write_text(json.dumps(content))
    assert says in refusal(path)


def test_ids_that_a_template_of_the_tokenizer_makes_up_are_refused_where_they_come(path):
    file = path / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"!": {"id": "!", "ids": [5000], "tokens": ["!"]}},
    }
    file.write_text(json.dumps(raw))
    llm = load(str(path), dtype="float32")
    assert llm.tokenizer.encode("abc", special=False)
    with pytest.raises(ValueError, match=r"token 5000.*no embedding"):
        llm.tokenizer.encode("abc")


def test_a_panic_of_the_tokenizers_library_is_an_error_like_others(path):
    class PanicException(BaseException):
        """As Rust's panics arrive in Python."""

    def panics(*_):
        raise PanicException("called `Option::unwrap()` on a `None` value\nnote: run with RUST_BACKTRACE=1")

    llm = load(str(path), dtype="float32")
    llm.tokenizer.encode_plain = llm.tokenizer.decode_ids = panics
    for work in (lambda: llm.tokenizer.encode("abc"), lambda: llm.tokenizer.decode([1])):
        with pytest.raises(ValueError, match="unwrap") as e:
            work()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("template", every(2, HOSTILE), ids=lambda t: t[:50])
def test_a_template_is_bounded_in_time_and_memory(template):
    """tests/fuzz/test_files.py tries these under a limit of memory, too."""
    try:
        assert len(QUICK_RENDERER.render(template, CONVERSATION, {}, True)) < 10**6
    except ValueError as e:
        assert "\n" not in str(e)


def test_what_templates_multiply_and_how_long_they_are_is_bounded():
    for template, says in (
        ("{{ 'a' * 10**9 }}", "more than 128 MiB"),
        (HOSTILE[0], "more than 2 seconds"),
        ("x" * (MAX_LENGTH + 1), "at most 262144 are read"),
        ("{{ 'ab' * 10**6 }}", "it writes 2000000 characters"),
        ("{{ (2).__class__ }}{{ 1 / 0 }}", "division by zero"),  # the process that was killed before is replaced
    ):
        with pytest.raises(ValueError, match=says):
            RENDERER.render(template, CONVERSATION, {}, True)


def test_threads_and_forks_render_at_once():
    def one(i: int) -> str:
        return RENDERER.render("{% for m in messages %}{{ m.content }}{% endfor %}" + str(i), CONVERSATION, {}, True)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(40))) == [f"hellohi{i}" for i in range(40)]
    if (pid := os.fork()) == 0:
        os._exit(0 if one(7) == "hellohi7" else 1)
    assert os.waitpid(pid, 0)[1] == 0 and one(8) == "hellohi8"


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(file, "{{ messages }}")
    return file.read_bytes()


@pytest.mark.parametrize(
    ("kind", "number", "says"),
    [
        ("tensors", 10**7, "it claims 10000000 tensors"),
        ("values", 2**63, "it claims"),
        ("length of a list", 10**7, "its lists have more than"),
        ("length of a list", 900_000, "more bytes than there are"),
        ("length of a list", 2**63, "its lists have more than"),
        ("length of a key", 2**62, "more bytes than there are"),
        ("length of a text", 2**64 - 1, "more bytes than there are"),
        ("dimensions", 2**31, "dimensions"),
        ("dimension", 2**62, "its tensors end at"),
        ("type of a tensor", 99, "unknown type 99"),
        ("type of a tensor", 1, "its tensors end at"),
        ("version", 2**20, "version"),
    ],
)
def test_numbers_of_a_gguf_header_that_the_file_cannot_hold(kind, number, says, good_gguf, tmp_path):
    data = bytearray(good_gguf)
    at, size, _ = [place for place in _places(data) if place[2] == kind][-1]
    data[at : at + size] = number.to_bytes(size, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    assert says in refusal(tmp_path / "m.gguf")


def test_gguf_tensors_lie_one_behind_the_other_to_the_end_of_the_file(good_gguf, tmp_path):
    file = tmp_path / "m.gguf"
    offsets = [at for at, _, kind in _places(bytearray(good_gguf)) if kind == "offset"]
    for change in (-32, 32):  # overlapping, and with a hole
        data = bytearray(good_gguf)
        (before,) = struct.unpack_from("<Q", data, offsets[3])
        struct.pack_into("<Q", data, offsets[3], before + change)
        file.write_bytes(data)
        assert "not behind the one before it" in refusal(file)
    file.write_bytes(good_gguf + bytes(32))
    assert "its tensors end at" in refusal(file)
    file.write_bytes(good_gguf)
    load(str(file), dtype="float32")


def test_a_weight_of_another_type_is_refused(path):
    edit(path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int32)}))
    assert "weights are one of" in refusal(path)


def test_others_may_read_what_is_written_as_far_as_the_user_lets_them(good_gguf, path, tmp_path):
    """The safetensors library makes its files private."""
    from weights.from_gguf import convert

    (tmp_path / "m.gguf").write_bytes(good_gguf)
    convert(tmp_path / "m.gguf", tmp_path / "converted")
    llm = load(str(path), dtype="float32")
    session = llm.session(4, None, parse("full"))
    session.start([[1, 2, 3]])
    save.save(llm, session, tmp_path / "c")
    plain = (path / "config.json").stat().st_mode
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "converted" / "model.safetensors").stat().st_mode == plain
    (tmp_path / "c").chmod(0o600)
    save.save(llm, session, tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600


def forged(llm, plan: str, file, change) -> str:
    """Why a saved cache is refused whose tensors were changed, and its checksum with them."""
    session = llm.session(8, None, parse(plan))
    session.start([text(60)])
    save.save(llm, session, file)
    with safe_open(file, framework="pt") as f:
        facts = json.loads(f.metadata()["nanokv"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    change(tensors, facts)
    facts["checksum"] = save.checksum(tensors, json.loads(json.dumps(facts)))
    save_file(tensors, file, metadata={"nanokv": json.dumps(facts)})
    with pytest.raises(ValueError, match="no saved cache of this model") as e:
        save.restore(llm, file, 8)
    assert "\n" not in str(e.value)
    return str(e.value)


INT4, FP8, QUEST = "full+int4:group=4,residual=8", "full+fp8", "full+quest:chunk=4,budget=16,grow=8"
FORGERIES = {
    "a token too many": (INT4, lambda t, f: t["0.0.codes.cursor"].add_(1)),
    "a token too few": (INT4, lambda t, f: t["0.0.codes.cursor"].sub_(1)),
    "a group too many": (INT4, lambda t, f: (t["0.0.codes.moved"].add_(1), t["0.0.codes.cursor"].add_(4))),
    "a group too few": (INT4, lambda t, f: (t["0.0.codes.moved"].sub_(1), t["0.0.codes.cursor"].sub_(4))),
    "no groups": (INT4, lambda t, f: (t["0.0.codes.moved"].zero_(), t["0.0.codes.cursor"].zero_())),
    "slots in another order": (INT4, lambda t, f: t.update({"0.0.codes.pos": t["0.0.codes.pos"].flip(2).contiguous()})),
    "a limit that nobody asked for": (INT4, lambda t, f: t["0.0.limit"].fill_(2**30)),
    "codes that are no numbers": (FP8, lambda t, f: t["0.0.codes.k0"].fill_(127)),
    "scales that are none": ("full+turbo", lambda t, f: t["0.0.codes.k1"].fill_(float("nan"))),
    "no scales": (FP8, lambda t, f: t.pop("0.0.codes.ks")),
    "keys of eight bits": (FP8, lambda t, f: t.update({"0.0.k": t["0.0.k"].to(torch.float8_e4m3fn)})),
    "scores below zero": ("h2o:budget=20", lambda t, f: t["0.0.attention"].sub_(5)),
    "scores of another type": ("h2o:budget=20", lambda t, f: t.update({"0.0.attention": t["0.0.attention"].double()})),
    "no scores": ("h2o:budget=20", lambda t, f: t.pop("0.0.attention")),
    "a score without an end": ("full", lambda t, f: f["scores"].update({"0": 10**400})),
    "a count without an end": (QUEST, lambda t, f: t.update({"0.0.codes.since_grown": torch.tensor(float("inf"))})),
    "more chunks than there are": (QUEST, lambda t, f: t["0.0.codes.n_chunks"].add_(1)),
    "chunks of other tokens": (QUEST, lambda t, f: t["0.0.codes.chunk_ids"].add_(1)),
    "tokens that come later": ("full", lambda t, f: f.update({"seen": 3})),
    "a budget in percent": ("snapkv:budget=20,window=4", lambda t, f: f.update({"plan": "snapkv:budget=40%,window=4,every=5"})),
    "layers that nobody has": ("full", lambda t, f: f.update({"share": {"9": 0}})),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGERIES)
def test_a_saved_cache_that_contradicts_itself_is_refused_even_with_a_right_checksum(what, path, tmp_path):
    plan, change = FORGERIES[what]
    forged(load(str(path), dtype="float32"), plan, tmp_path / "c", change)


def test_a_flipped_bit_of_a_saved_cache_is_seen(path, tmp_path):
    llm, file = load(str(path), dtype="float32"), tmp_path / "c"
    session = llm.session(8, None, parse("full"))
    session.start([text(20)])
    save.save(llm, session, file)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        save.restore(llm, file, 8)
    file.unlink()
    pipe(file)
    with pytest.raises(ValueError, match="regular"):
        save.restore(llm, file, 8)


@pytest.mark.parametrize("values", [{"rope_theta": 1e-29}, {"rope_scaling": {"rope_type": "linear", "factor": 1e-40}}])
def test_rotations_that_are_no_numbers_are_refused(values, path):
    reconfigure(path, **values)
    assert "angles that are no numbers" in refusal(path)


def test_gates_in_a_pipe_are_refused(path, tmp_path):
    pipe(tmp_path / "gates")
    llm = load(str(path), f"duo:gates={tmp_path / 'gates'},recent=8,sink=2", dtype="float32")
    with pytest.raises(ValueError, match="no such file"):
        llm.session(4).start([text(40)])


def test_a_home_of_nobody_is_an_unknown_model():
    with pytest.raises(ValueError, match="unknown model"):
        load("~nosuchuser/x")
