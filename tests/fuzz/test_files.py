"""Damaged files of every kind: each is refused in one sentence, or read, within five seconds and little memory."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from fuzz.forks import attempt_all
from fuzz.gguf_parts import altered_gguf, write_gguf
from fuzz.mutate import NUMBERS, altered, damaged, written
from fuzz.templates import CONVERSATION, draw_template
from safetensors.torch import load_file, save_file
from tiny import text, write_seeded

from nanokv import load, parse, save
from nanokv.policies import EXAMPLES, POLICIES
from nanokv.sharing.search import read_map
from nanokv.stores import EXAMPLES as STORE_EXAMPLES
from nanokv.text.template import Renderer

RENDERER = Renderer()
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "add_bos_token": True,
    "chat_template": TEMPLATE,
    "model_max_length": 512,
    "added_tokens_decoder": {
        "96": {"content": "<s>", "special": True},
        "97": {"content": "</s>", "special": True, "lstrip": True},
    },
    "additional_special_tokens": ["<s>"],
}
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 100,
}


@pytest.fixture(autouse=True)
def no_process_for_each_model(monkeypatch):
    """RENDERER serves all."""
    monkeypatch.setattr(Renderer, "start", lambda self: None)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model directory with every file that is read beside the weights."""
    path = tmp_path_factory.mktemp("pristine") / "model"
    write_seeded(
        path, **SHAPE, num_hidden_layers=2, rope_parameters={"rope_type": "llama3", "rope_theta": 5e4, **LLAMA3}
    )
    files = {
        "tokenizer_config.json": SETTINGS,
        "generation_config.json": {"eos_token_id": [97]},
        "added_tokens.json": {"<pad>": 98},
        "special_tokens_map.json": {"pad_token": "<pad>", "unk_token": {"content": "<s>"}},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def used(path: Path) -> tuple[list[int], str, str, torch.Tensor]:
    """A model at work: ids of a text, the text again, a chat and logits."""
    llm = load(str(path), dtype="float32")
    llm.tokenizer.renderer = RENDERER  # one process for all
    ids = llm.tokenizer.encode("some text, and </s> more")
    try:
        chat = llm.tokenizer.chat([{"role": "user", "content": "hello"}])
    except ValueError as e:
        chat = str(e)
    llm.tokenizer.turn_end()
    return ids, llm.tokenizer.decode(ids), chat, llm.session(1).start([ids])


def same(a: tuple, b: tuple) -> bool:
    return a[:3] == b[:3] and torch.equal(a[3], b[3])


def n_cases(request) -> range:
    return range(request.config.getoption("--cases") or 100)


def check(request, name: str, attempt: Callable[[int], str], file_bytes: int = 0) -> None:
    found = attempt_all(n_cases(request), attempt, file_bytes)
    print(f"\n{name}: {found}", *found.bad[:20], sep="\n", flush=True)
    assert not found.bad, f"{found}\n" + "\n".join(found.bad[:40])


DIRECTORY = {
    "config.json": "json",
    "generation_config.json": "json",
    "tokenizer.json": "json",
    "tokenizer_config.json": "json",
    "added_tokens.json": "json",
    "special_tokens_map.json": "json",
    "model.safetensors": "header",
}


@pytest.mark.parametrize("name", DIRECTORY)
def test_a_model_directory_with_a_damaged(name, request, pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "model")
    right, file, good = used(pristine), tmp_path / "model" / name, (pristine / name).read_bytes()

    def attempt(i: int) -> str:
        dice = random.Random(i)
        if DIRECTORY[name] == "json":
            file.write_bytes(written(altered(json.loads(good), dice), dice))
        else:
            file.write_bytes(header_altered(good, dice) if dice.random() < 0.6 else damaged(good, dice))
        return "equal" if same(used(file.parent), right) else "different"

    check(request, name, attempt, len(good))


def test_a_damaged_sentencepiece_model(request, pristine, tmp_path):
    path, model = tmp_path / "model", io.BytesIO()
    shutil.copytree(pristine, path)
    corpus = ["the quick brown fox jumps over the lazy dog", "some text, and more of it"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        (path / name).unlink()
    (path / "tokenizer_config.json").write_text("{}")
    file, good = path / "tokenizer.model", model.getvalue()
    file.write_bytes(good)
    right = used(path)

    def attempt(i: int) -> str:
        file.write_bytes(damaged(good, random.Random(i)))
        return "equal" if same(used(path), right) else "different"

    check(request, "tokenizer.model", attempt, len(good))


def header_altered(data: bytes, dice: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    (n,) = struct.unpack("<Q", data[:8])
    header = json.dumps(altered(json.loads(data[8 : 8 + n]), dice)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


def test_an_index_with_other_shards(request, pristine, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(pristine, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shards = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, path / shard)
    right, file = used(pristine), path / "model.safetensors.index.json"

    def attempt(i: int) -> str:
        dice = random.Random(i)
        file.write_bytes(written(altered({"metadata": {"total_size": 1}, "weight_map": dict(shards)}, dice), dice))
        return "equal" if same(used(path), right) else "different"

    check(request, "model.safetensors.index.json", attempt)


def test_a_damaged_gguf_file(request, tmp_path, gguf_file):
    right, good, file = used(gguf_file), gguf_file.read_bytes(), tmp_path / "model.gguf"

    def attempt(i: int) -> str:
        dice = random.Random(i)
        file.write_bytes(altered_gguf(good, dice) if dice.random() < 0.7 else damaged(good, dice))
        return "equal" if same(used(file), right) else "different"

    check(request, "gguf", attempt, len(good))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, TEMPLATE)
    return file


SAVED = (
    "snapkv:budget=20,window=4,kernel=3",
    "h2o:budget=20",
    "streaming:sink=2,recent=10",
    *(f"full+{x}" for x in STORE_EXAMPLES.values() if not x.startswith("mixed")),
    "mikv:budget=20",
    "adakv:budget=20,window=4",
)


def test_a_damaged_saved_cache(request, tmp_path, llm_of):
    llm, file, kinds = llm_of("g3"), tmp_path / "cache", []
    for plan in SAVED:
        session = llm.session(8, None, parse(plan))
        session.start([text(60)])
        save.save(llm, session, file)
        kinds.append((file.read_bytes(), load_file(file), session.feed(torch.tensor([[5]]))))

    def attempt(i: int) -> str:
        dice = random.Random(i)
        data, tensors, right = dice.choice(kinds)
        if dice.random() < 0.4:
            file.write_bytes(damaged(data, dice))
            sound = False
        else:
            sound = dice.random() < 0.7  # the checksum is that of the altered tensors
            write_altered(file, data, dict(tensors), dice, sound)
        session = save.restore(llm, file, 8)
        logits = session.feed(torch.tensor([[5]]))
        session.feed(torch.tensor([[5, 6, 7]]))
        if torch.equal(logits, right):
            return "equal"
        return "different" if sound else "silent: another cache than was saved"

    check(request, "saved cache", attempt, max(len(data) for data, _, _ in kinds))


def write_altered(file: Path, data: bytes, tensors: dict[str, torch.Tensor], dice: random.Random, sound: bool) -> None:
    """A cache in which tensors or facts are others than the ones saved."""
    (n,) = struct.unpack("<Q", data[:8])
    facts = json.loads(json.loads(data[8 : 8 + n])["__metadata__"]["nanokv"])
    if dice.random() < 0.4:
        checksum = facts.pop("checksum", None)
        facts = altered(facts, dice)
        if checksum and isinstance(facts, dict):
            facts["checksum"] = checksum
    else:
        for _ in range(dice.choice((1, 1, 2))):
            name = dice.choice(sorted(tensors))
            x = tensors[name]
            kind = dice.randrange(7)
            if kind == 0:
                del tensors[name]
            elif kind == 1:
                tensors[name] = x[..., : x.shape[-1] // 2].contiguous() if x.dim() else x[None]
            elif kind == 2:
                tensors[name] = x.to(
                    dice.choice((torch.float32, torch.int32, torch.float16, torch.uint8, torch.int64, torch.bool))
                )
            elif kind == 3 and not x.is_floating_point():
                flat = x.flatten().clone()
                if len(flat):
                    low, high = torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max
                    flat[dice.randrange(len(flat))] = dice.choice(
                        [v for v in (-2, -1, 0, 1, 7, 60, 61, 10**6, high) if low <= v <= high]
                    )
                tensors[name] = flat.view(x.shape)
            elif kind == 4 and x.is_floating_point():
                tensors[name] = torch.full_like(x.float(), dice.choice((float("nan"), float("inf"), 0.0, 1e30))).to(
                    x.dtype
                )
            elif kind == 5:
                tensors[dice.choice((*sorted(tensors), "x", "0", "0.0", "9.0.k", "a.b.c", "0.1.k"))] = x.clone()
            else:
                tensors[name] = torch.cat((x, x), -1) if x.dim() else x
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    if sound and isinstance(facts, dict) and "checksum" in facts:
        facts["checksum"] = save.checksum(tensors, json.loads(json.dumps(facts)))
    save_file(tensors, file, metadata={"nanokv": json.dumps(facts)})


def test_a_damaged_map_of_shared_layers(request, tmp_path, llm_of):
    llm, file = llm_of("deep"), tmp_path / "map.json"
    good = {
        "model": "deep",
        "fingerprint": llm.fingerprint(),
        "map": {"3": 1, "5": 2},
        "pairs": [{"reader": 3, "owner": 1}],
    }

    def attempt(i: int) -> str:
        dice = random.Random(i)
        file.write_bytes(written(altered(json.loads(json.dumps(good)), dice), dice))
        share = read_map(file, llm.fingerprint(), llm.config)
        plan = parse(f"full+kvsharer:map={file}")
        llm.session(2, None, plan).start([[1, 2, 3]])
        return "equal" if share == {3: 1, 5: 2} else "different"

    check(request, "map of shared layers", attempt)


def test_any_chat_template(request):
    renderer = Renderer(seconds=0.15)  # of the same limit as 2, and the cases take less time

    def attempt(i: int) -> str:
        renderer.render(draw_template(random.Random(i)), CONVERSATION, {"bos_token": "<s>"}, True)
        return "different"

    check(request, "chat template", attempt)


def test_any_text_of_a_plan(request):
    known = [plan for examples in EXAMPLES.values() for plan in examples.small] + [
        f"full+{x}" for x in STORE_EXAMPLES.values()
    ]
    pieces = [
        *POLICIES,
        *STORE_EXAMPLES,
        "kvsharer",
        *"+:,=%",
        "budget",
        "window",
        "1e9",
        "-1",
        "nan",
        "inf",
        "9" * 400,
        "²",
        "٣",
        "0x10",
        "1_0",
        " ",
        "\n",
        "true",
        "none",
    ]

    def attempt(i: int) -> str:
        dice = random.Random(i)
        plan = dice.choice(known)
        if dice.random() < 0.5:  # another number
            plan = re.sub(r"\d+", lambda match: str(dice.choice(NUMBERS)) if dice.random() < 0.4 else match[0], plan)
        else:
            at = dice.randrange(len(plan) + 1)
            plan = plan[:at] + dice.choice(pieces) + plan[at + dice.choice((0, 0, 1, 5)) :]
        said = str(parse(plan))
        return "equal" if str(parse(said)) == said else f"silent: {plan!r} became {said!r}"

    check(request, "plan", attempt)
