"""Text ↔ ids. Oracles: the tokenizers library put together by hand, sentencepiece itself, transformers' chat templates."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import gguf
import pytest
import sentencepiece
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from nanokv.model.config import ModelConfig
from nanokv.text.stream import Stream
from nanokv.text.tokenizer import Tokenizer, byte_level, from_dir
from weights.fetch import locate
from weights.from_gguf import GGUF

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 60000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the other dog over there",
    "aaaa aaa aa a abab ababab abaaba banana bandana ==== == -- ---- ... ......",
    "hello hello hello world 12 345 2024 3.14 [INST] say hello [/INST] hello",
    "naïve café déjà vu über straße 你好 世界 你好世界 こんにちは",
    "  two  spaces    four      six\nline\n\nlines\ttab",
    "x = f(a[0], b) != c; don't can't we'll I'm you're he's they'd we've",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 6 × 7?"},
    {"role": "assistant", "content": "42 🙂"},
]
EMOJI = ["🙂", "🦊", "👩‍👩‍👧", "🇫🇷", "👍🏽", "❤️"]
PARTS = [
    lambda r: r.choice(" ".join(CORPUS).split()),
    lambda r: " " + r.choice(" ".join(CORPUS).split()),
    lambda r: "".join(r.choices("abcdefgh ijklmno", k=r.randint(1, 8))),
    lambda r: "".join(r.choices("ab", k=r.randint(1, 9))),
    lambda r: str(r.randint(0, 10 ** r.randint(1, 6))),
    lambda r: f" {r.randint(0, 9999)}",
    lambda r: " " * r.randint(1, 5),
    lambda r: r.choice(["\n", "\n\n", "\n \n", "\t", " \n"]),
    lambda r: "".join(r.choices("!?.,;:-_=+*/()[]{}<>#$%&@'\"\\|~^`", k=r.randint(1, 4))),
    lambda r: r.choice(["'s", "'re", "don't", "I'LL", "we'd", "'ve", "'"]),
    lambda r: r.choice(["café", "naïve", "Ångström", "e\u0301", "ß", "ǅ", "İ"]),
    lambda r: "".join(chr(r.randint(0x4E00, 0x9FFF)) for _ in range(r.randint(1, 4))),
    lambda r: r.choice(["你好", "世界", "こんにちは", "한국어", "你好世界世界"]),
    lambda r: r.choice(EMOJI) * r.randint(1, 3),
    lambda r: "".join(anything(r) for _ in range(r.randint(1, 4))),
]


def anything(dice: random.Random) -> str:
    """Any character that is no control, no surrogate and not private."""
    while True:
        c = chr(dice.randint(0x20, 0x2FFFF))
        if c.isprintable() or (c.isspace() and c > "\x7f"):
            return c


def strings(n: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choice(PARTS)(dice) for _ in range(dice.randint(1, 12))) for _ in range(n)]


def shape(**extra) -> ModelConfig:
    return ModelConfig.from_json({**SHAPE, **extra}, "config.json")


def refusal(do, *args, **kwargs) -> str:
    """The one line with which it is refused."""
    with pytest.raises(ValueError) as e:
        do(*args, **kwargs)
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def home() -> Path:
    return locate("smollm2-135m")


@pytest.fixture(scope="module")
def smollm(home) -> Tokenizer:
    return from_dir(home, ModelConfig.from_dir(home))


def train(**extra) -> sentencepiece.SentencePieceProcessor:
    """A small model of Llama 2's kind."""
    out = io.BytesIO()
    settings = {"vocab_size": 480, "model_type": "bpe", "byte_fallback": True, "split_digits": True, "num_threads": 1}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 1.0}
    settings |= {"allow_whitespace_only_pieces": True, "minloglevel": 2, **extra}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 5), model_writer=out, **settings)
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.fixture(scope="module")
def sp() -> sentencepiece.SentencePieceProcessor:
    return train()


def write_sp(path: Path, sp, **settings) -> Tokenizer:
    """Through tokenizer.model."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return from_dir(path, shape(bos_token_id=1, eos_token_id=2))


def write_gguf(path: Path, sp, tokens: dict[str, int] | None = None, ids=None, **meta) -> Tokenizer:
    """Through the metadata of a GGUF file; tokens: added ones, with their types; ids: the pieces in another order."""
    path.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path / "m.gguf", "llama")
    ids, tokens = ids or range(sp.GetPieceSize()), tokens or {}
    kinds = [2 if sp.IsUnknown(i) else 3 if sp.IsControl(i) else 6 if sp.IsByte(i) else 1 for i in ids]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([sp.IdToPiece(i) for i in ids] + list(tokens))
    writer.add_token_scores([sp.GetScore(i) for i in ids] + [0.0] * len(tokens))
    writer.add_token_types(kinds + list(tokens.values()))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in meta.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = GGUF(path / "m.gguf")
    (path / "tokenizer.json").write_text(file.tokenizer_json(), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(file.tokenizer_config()), encoding="utf-8")
    return from_dir(path, shape(bos_token_id=1, eos_token_id=2))


@pytest.fixture(scope="module")
def kinds(sp, smollm, tmp_path_factory) -> dict[str, Tokenizer]:
    """One tokenizer of each kind."""
    path = tmp_path_factory.mktemp("kinds")
    return {
        "tokenizer.json": smollm,
        "tokenizer.model": write_sp(path / "model", sp),
        "gguf": write_gguf(path / "gguf", sp),
        "bytes": byte_level(),
    }


KINDS = ["tokenizer.json", "tokenizer.model", "gguf", "bytes"]
PIECES = ["tokenizer.model", "gguf"]  # the two ways to a sentencepiece vocabulary


# the default model


def test_the_default_tokenizer_encodes_as_bpe_over_single_digits_and_bytes(home, smollm):
    saved = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    oracle = Fast(models.BPE(saved["vocab"], [tuple(m) for m in saved["merges"]]))
    first = pre_tokenizers.Digits(individual_digits=True)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for s in strings(1000):
        assert smollm.encode(s) == oracle.encode(s).ids, s


def test_the_default_tokenizer_decodes_what_it_encodes(smollm):
    for s in strings(1000, seed=1):
        assert smollm.decode(smollm.encode(s)) == s


def test_every_digit_is_a_token_of_the_default_tokenizer(smollm):
    for s in ["7", "1234567", " 42", "a1b22", "3.14", "in 2024, 10%"]:
        shown = [smollm.decode([i]) for i in smollm.encode(s)]
        assert [c for c in shown if any(map(str.isdigit, c))] == [c for c in s if c.isdigit()]


def test_special_tokens_in_a_text_become_their_ids(smollm):
    ids = smollm.encode("<|im_start|>user\nhi<|im_end|>\n")
    assert ids[0] == 1 and ids.count(2) == 1 and len(ids) < 8
    assert smollm.decode(ids) == "user\nhi\n"
    assert smollm.eos == (2, 0)  # the end of a turn, which the file names, and the end of a text


# sentencepiece, through tokenizer.model and through a GGUF file


def test_a_tokenizer_model_encodes_as_sentencepiece(kinds, sp):
    for s in strings(300, seed=2):
        assert kinds["tokenizer.model"].encode(s) == [1, *sp.EncodeAsIds(s)]


def test_a_sentencepiece_model_rebuilt_from_gguf_encodes_as_sentencepiece(kinds, sp):
    for s in ["", " ", "  ", "\n", "▁", "▁a", "<0x41>", "\0", *strings(1000, seed=3)]:
        assert kinds["gguf"].encode(s) == [1, *sp.EncodeAsIds(s)], s


def test_scores_and_not_ids_decide_what_a_rebuilt_model_joins_first(sp, tmp_path):
    special, rest = list(range(3)), list(range(3, sp.GetPieceSize()))
    random.Random(0).shuffle(rest)
    words = write_gguf(tmp_path, sp, ids=special + rest)
    for s in strings(300, seed=10):
        assert [(special + rest)[i] for i in words.encode(s, special=False)] == sp.EncodeAsIds(s), s


def test_a_rebuilt_model_decodes_as_sentencepiece(kinds, sp):
    for s in strings(300, seed=4):
        assert kinds["gguf"].decode(sp.EncodeAsIds(s)) == sp.DecodeIds(sp.EncodeAsIds(s))


@pytest.mark.parametrize("kind", PIECES)
def test_sentencepiece_decodes_what_it_encodes(kinds, kind):
    for s in [*EMOJI, " a", "a ", *strings(300, seed=5)]:
        s = s.replace("▁", "_")  # sentencepiece's own sign for a space
        assert kinds[kind].decode(kinds[kind].encode(s)) == s


@pytest.mark.parametrize("kind", PIECES)
def test_control_and_unknown_tokens_are_not_shown(kinds, kind, sp):
    assert kinds[kind].decode([1, *sp.EncodeAsIds("hello"), 0, 2]) == "hello"


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("text", ["hello", "<s>hello", "<s> hello", "", "<s>"])
def test_bos_comes_once(kinds, kind, text):
    ids = kinds[kind].encode(text)
    assert ids[0] == 1 and ids.count(1) == 1


@pytest.mark.parametrize("kind", PIECES)
def test_without_special_tokens_a_text_is_taken_as_it_stands(kinds, kind):
    assert 1 not in kinds[kind].encode("hello", special=False)
    assert kinds[kind].encode("<s><s></s><unk>", special=False) == [1, 1, 2, 0]


@pytest.mark.parametrize("kind", PIECES)
def test_special_strings_inside_a_chat_become_their_ids(kinds, kind, sp):
    ids = kinds[kind].encode("<s>[INST] hello [/INST] hello</s><s>[INST] hello", special=False)
    first, second = sp.EncodeAsIds("[INST] hello [/INST] hello"), sp.EncodeAsIds("[INST] hello")
    assert ids == [1, *first, 2, 1, *second]


def test_bos_is_left_out_where_the_settings_say_so(sp, tmp_path):
    ids = sp.EncodeAsIds("hello")
    assert write_sp(tmp_path / "a", sp, add_bos_token=False).encode("hello") == ids
    assert write_gguf(tmp_path / "b", sp, add_bos_token=False).encode("hello") == ids


def test_added_tokens_of_a_tokenizer_model_become_their_ids(sp, tmp_path):
    added = {"480": {"content": "<|im_start|>", "special": True}, "481": {"content": "<|im_end|>", "special": True}}
    words = write_sp(tmp_path, sp, added_tokens_decoder=added, eos_token="<|im_end|>")
    assert words.encode("<|im_start|>hello<|im_end|>") == [1, 480, *sp.EncodeAsIds("hello"), 481]
    assert words.decode([480, *sp.EncodeAsIds("hello"), 481]) == "hello"
    assert words.size == 482
    assert set(words.eos) == {2, 481}


def test_added_tokens_of_a_gguf_become_their_ids(sp, tmp_path):
    words = write_gguf(tmp_path, sp, {"<|im_start|>": 3, "<tool>": 4})
    hello = sp.EncodeAsIds("hello")  # with the space before it, as llama.cpp does after each such token
    assert words.encode("<|im_start|>hello<tool>hello") == [1, 480, *hello, 481, *hello]
    assert words.decode(words.encode("<|im_start|>hello<tool>")) == "hello<tool>"  # control tokens are not shown


def test_a_model_without_dummy_prefix_is_rebuilt_without_one(tmp_path):
    sp = train(add_dummy_prefix=False)
    words = write_gguf(tmp_path, sp, add_space_prefix=False)
    for s in [" a", "a", "", *strings(300, seed=6)]:
        assert words.encode(s, special=False) == sp.EncodeAsIds(s), s
        assert words.decode(sp.EncodeAsIds(s)) == sp.DecodeIds(sp.EncodeAsIds(s))


def test_byte_and_control_pieces_are_never_put_together_from_letters(sp, tmp_path):
    """sentencepiece finds only normal pieces when it joins; here the vocabulary holds the halves of <0x41>."""
    tokens = {"<0": 1, "x4": 1, "1>": 1, "<0x4": 1, "<": 1, ">": 1}
    words = write_gguf(tmp_path, sp, tokens)
    assert sp.PieceToId("<0x41>") not in words.encode("<0x41>")


# text as it streams


def streamed(words: Tokenizer, before: list[int], ids: list[int]) -> list[str]:
    stream = Stream(words, before)
    return [*(stream.push(i) for i in ids), stream.end()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_joins_to_the_text_decoded_at_once(kinds, kind):
    words, dice = kinds[kind], random.Random(7)
    for s in strings(200, seed=8):
        ids = words.encode(s)
        cut = dice.randint(0, len(ids))
        while words.decode(ids[:cut]).endswith("\ufffd"):
            cut -= 1  # a prompt ends with a whole character
        assert words.decode(ids[:cut]) + "".join(streamed(words, ids[:cut], ids[cut:])) == words.decode(ids), s


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_never_shows_half_a_character(kinds, kind):
    words = kinds[kind]
    for s in [*(e * 40 for e in EMOJI), "語" * 150, "a" + "語" * 90 + "🦊" * 70, *strings(200, seed=9)]:
        pieces, shown = streamed(words, [], words.encode(s, special=False)), ""
        for piece in pieces:
            shown += piece
            assert s.replace("▁", " ").startswith(shown) if kind in PIECES else s.startswith(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_after_a_prompt_of_many_byte_tokens(kinds, kind):
    words = kinds[kind]
    for long in (99, 100, 101, 102):
        n = len(words.encode("語" * long))
        ids = words.encode("語" * long + "鬱" * 33)
        assert "".join(streamed(words, ids[:n], ids[n:])) == "鬱" * 33


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_out_each_word_at_once(kinds, kind):
    words = kinds[kind]
    ids = words.encode("hello" + " hello" * 100, special=False)
    pieces = streamed(words, [], ids)
    assert all(pieces[:-1]) and pieces[-1] == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["the dog", "the dog\n", "你好", "🦊"])
def test_a_stream_keeps_the_space_before_the_first_word(kinds, kind, before):
    words = kinds[kind]
    n = len(words.encode(before))
    ids = words.encode(before + " hello")
    assert "".join(streamed(words, ids[:n], ids[n:])) == " hello"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_keeps_the_space_after_a_token_that_is_not_shown(kinds, kind):
    words = kinds[kind]
    hello, world = words.encode("hello", special=False), words.encode("x world", special=False)[1:]
    hidden = [*words.eos] * 9
    whole = words.decode([*hello, *hidden, *world])
    for before, ids in [(hello, [*hidden, *world]), ([*hello, *hidden], world), ([], [*hello, *hidden, *world])]:
        assert words.decode(before) + "".join(streamed(words, before, ids)) == whole


def test_a_stream_shows_at_its_end_what_it_held_back(smollm):
    ids = smollm.encode("a🦊")[:-1]
    pieces = streamed(smollm, [], ids)
    assert pieces[0] == "a" and "\ufffd" in pieces[-1] and not any(pieces[1:-1])


def test_a_stream_of_bytes_that_are_no_text_still_flows():
    pieces = streamed(byte_level(), [], [0xFF] * 200)
    assert any(pieces[:100]) and "".join(pieces) == "\ufffd" * 200


# tokens that other files add

ADDED = {"<|im_end|>": 96, "<|x|>": 97}
FILES = {
    "added_tokens": {"added_tokens.json": ADDED},
    "special_tokens_map": {
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|x|>"]}
    },
    "both": {"added_tokens.json": ADDED, "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}},
    "decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "96": {"content": "<|im_end|>", "special": True, "normalized": False},
                "97": {"content": "<|x|>", "special": False, "lstrip": True},
            }
        }
    },
    "extra": {"tokenizer_config.json": {"extra_special_tokens": ["<|im_end|>", "<|x|>"]}},
    "additional": {"tokenizer_config.json": {"additional_special_tokens": ["<|im_end|>", "<|x|>"]}},
    "eos_token": {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
    "flags": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"96": {"content": "<|im_end|>", "lstrip": True, "rstrip": True, "special": True}}
        }
    },
}


@pytest.mark.parametrize("which", FILES)
def test_tokens_of_every_file_are_added_as_transformers_adds_them(which, tmp_path):
    from tiny import write_tokenizer
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    files = {"tokenizer_config.json": {}, **FILES[which]}
    files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", **files["tokenizer_config.json"]}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = from_dir(tmp_path, shape(vocab_size=128)), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a<|im_end|>b <|x|> c", "<|x|><|im_end|>", "plain"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.size == len(theirs)


def test_flags_of_an_added_token_count_with_a_tokenizer_model_too(sp, tmp_path):
    hello, world = (sp.EncodeAsIds(x) for x in ("hello", "world"))
    for name, flags, text, ids in (
        ("strip", {"lstrip": True, "rstrip": True}, "hello  <|x|>  world", [*hello, 480, *world]),
        ("plain", {}, "hello<|x|>world", [*hello, 480, *world]),
    ):
        (tmp_path / name).mkdir()
        words = write_sp(tmp_path / name, sp, added_tokens_decoder={"480": {"content": "<|x|>", **flags}})
        assert words.encode(text, special=False) == ids
    word = {"480": {"content": "ab", "single_word": True}}
    (tmp_path / "ab").mkdir()
    words = write_sp(tmp_path / "ab", sp, added_tokens_decoder=word)
    assert 480 not in words.encode("abab") and 480 in words.encode("x ab y")


def test_text_behind_an_added_token_begins_with_no_space_unless_legacy_says_so(sp, tmp_path):
    added = {"480": {"content": "<|x|>"}}
    ids = {}
    for legacy in (True, False):
        (tmp_path / str(legacy)).mkdir()
        words = write_sp(tmp_path / str(legacy), sp, added_tokens_decoder=added, legacy=legacy)
        ids[legacy] = words.encode("hello<|x|>hello", special=False)
        assert sp.DecodeIds(ids[legacy][: ids[legacy].index(480)]) == "hello"
    assert ids[True][ids[True].index(480) + 1 :] == sp.EncodeAsIds("hello")
    assert ids[False] != ids[True] and sp.DecodeIds(ids[False][ids[False].index(480) + 1 :]) == "hello"


def test_a_tokenizer_model_adds_no_space_where_the_settings_say_so(sp, tmp_path):
    (tmp_path / "a").mkdir()
    words = write_sp(tmp_path / "a", sp, add_prefix_space=False)
    assert words.encode("hello", special=False) != sp.EncodeAsIds("hello")
    assert words.encode(" hello", special=False) == sp.EncodeAsIds("hello")


def test_tokens_are_added_to_a_tokenizer_model_too(sp, tmp_path):
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 480, "<|x|>": 481}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    words = write_sp(tmp_path, sp)
    hello = sp.EncodeAsIds("hello")
    assert words.encode("hello<|x|>hello<|im_end|>") == [1, *hello, 481, *hello, 480]
    assert words.decode([*hello, 481, *hello, 480]) == "hello<|x|>hello"  # only special tokens are hidden
    assert 480 in words.eos


def test_an_added_token_that_the_model_has_no_row_for_is_refused_only_where_a_text_holds_it(sp, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text(Fast(models.BPE({"a": 0, "b": 1}, [])).to_str())
    (tmp_path / "b" / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    for name, rows in (("a", 2), ("b", 480)):
        (tmp_path / name / "added_tokens.json").write_text(json.dumps({"<pad>": rows}))
        words = from_dir(tmp_path / name, shape(vocab_size=rows))
        assert words.decode(words.encode("a")) == "a" and words.size == rows + 1
        assert "'<pad>', a token for which this model has no embedding" in refusal(words.encode, "ab<pad>")
        assert from_dir(tmp_path / name, shape(vocab_size=rows + 1)).encode("<pad>")[-1] == rows


def test_an_id_that_cannot_be_given_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(Fast(models.BPE({"a": 0, "b": 1}, [])).to_str())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 7}))
    assert "gives token '<pad>' the id 7" in refusal(from_dir, tmp_path, shape(vocab_size=10))


# chat templates


def templated(path: Path, template=None, **settings) -> Tokenizer:
    (path / "tokenizer.json").write_text(Fast(models.BPE({"a": 0}, [])).to_str())
    settings |= {} if template is None else {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return from_dir(path, shape())


def test_the_default_models_chat_is_rendered_as_transformers_does(home, smollm):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(home)
    for chat, more in [(CHAT, True), (CHAT, False), (CHAT[1:], True)]:
        theirs = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=more)
        assert smollm.chat(chat, more) == theirs
        assert smollm.encode(theirs, special=False) == oracle(theirs, add_special_tokens=False)["input_ids"]


def test_a_template_sees_messages_and_special_tokens(tmp_path):
    words = templated(tmp_path, "{{ bos_token }}{{ messages[1]['content'] }}{{ eos_token }}", bos_token="<s>",
                      eos_token={"content": "</s>", "lstrip": False})  # fmt: skip
    assert words.chat(CHAT) == "<s>What is 6 × 7?</s>"


def test_templates_trim_blocks_and_may_break_out_of_loops(tmp_path):
    template = "{% for m in messages %}\n  {% if loop.index > 2 %}\n{% break %}{% endif %}\n{{ m.role }}\n{% endfor %}"
    assert templated(tmp_path, template).chat(CHAT) == "system\nuser\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages | tojson(ensure_ascii=True) }}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
        "{{ {'b': 1, 'a': ['é']} | tojson(True, 1) }}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
        "{%- generation -%} {{ bos_token }} {%- endgeneration -%} end",
        {"default": "{{ messages | length }}", "tool_use": "tools"},
    ],
)
def test_templates_may_use_what_transformers_adds_to_jinja(template, tmp_path):
    from transformers import AutoTokenizer

    words = templated(tmp_path, template, bos_token="<s>", tokenizer_class="PreTrainedTokenizerFast")
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, tokenize=False)
    assert words.chat(CHAT, add_generation_prompt=False) == theirs


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{{ eos_token }}{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ""),
        ("{{ raise_exception('no') }}", ""),
        (None, ""),
    ],
)
def test_the_token_that_ends_a_turn_is_the_one_behind_an_answer(template, end, tmp_path):
    special = ["<|im_start|>", "<|im_end|>", "<|im_end|>>"]
    assert templated(tmp_path, template, additional_special_tokens=special).turn_end() == end


def test_of_several_named_templates_the_default_one_is_used(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert templated(tmp_path, named).chat(CHAT) == "plain"


def test_chat_template_jinja_comes_before_the_settings(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("from the file: {{ messages|length }}", encoding="utf-8")
    assert templated(tmp_path, "from the settings").chat(CHAT) == "from the file: 3"


def test_a_chat_template_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    assert "chat_template.jinja" in refusal(templated, tmp_path)


@pytest.mark.parametrize("template", [5, {"a": "b"}, [{"name": "default", "template": 5}]], ids=str)
def test_a_chat_template_of_another_type_is_refused(tmp_path, template):
    assert "chat_template" in refusal(templated, tmp_path, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].pop('role') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('two\nlines') }}",
        "{{ raise_exception('') }}",
        "{{ raise_exception() }}",
        "{% if %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 'abc'.index('z') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_does_what_it_must_not_is_refused_in_one_line(tmp_path, template):
    chat = [dict(m) for m in CHAT]
    assert refusal(templated(tmp_path, template).chat, chat).startswith("the model's chat template")
    assert chat == CHAT


def test_the_words_of_raise_exception_reach_the_user(tmp_path):
    words = templated(tmp_path, "{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in refusal(words.chat, CHAT)


def test_a_model_without_a_template_says_so(tmp_path):
    assert "no chat template" in refusal(templated(tmp_path).chat, CHAT)


# the ids that end a text


def test_eos_ids_of_all_three_files_are_taken(tmp_path):
    tok = Fast(models.BPE({c: i for i, c in enumerate("abcdefgh")}, []))
    (tmp_path / "tokenizer.json").write_text(tok.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "f"}}))
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 4]}))
    assert from_dir(tmp_path, ModelConfig.from_dir(tmp_path)).eos == (2, 3, 4, 5)


def test_a_tokenizer_model_alone_knows_its_own_eos(sp, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    assert from_dir(tmp_path, shape()).eos == (2,)


# what cannot be used


@pytest.mark.parametrize("kind", [*PIECES, "tokenizer.json"])
def test_a_text_with_half_a_character_is_refused(kinds, kind):
    assert "UTF-8" in refusal(kinds[kind].encode, "caf\udce9")  # as Python reads a Latin-1 argument


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"version": "1.0", "model": {}}', "\udcff\n\n"])
def test_a_broken_tokenizer_json_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text, errors="surrogateescape")
    assert "tokenizer.json" in refusal(from_dir, tmp_path, shape())


def test_a_tokenizer_json_cut_short_is_refused(home, tmp_path):
    whole = (home / "tokenizer.json").read_bytes()
    for n in (10, 5000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "tokenizer.json").write_bytes(whole[:n])
        assert "tokenizer.json" in refusal(from_dir, tmp_path, shape())


def test_a_broken_tokenizer_model_is_refused(sp, tmp_path):
    whole = sp.serialized_model_proto()
    for data in (b"", b"garbage", b"<html>\n</html>", whole[:1000], whole[:-10]):
        (tmp_path / "tokenizer.model").write_bytes(data)
        assert "tokenizer.model" in refusal(from_dir, tmp_path, shape())


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    assert "neither tokenizer.json nor tokenizer.model" in refusal(from_dir, tmp_path, shape())


def test_a_tokenizer_larger_than_the_model_is_refused(home, sp, tmp_path):
    assert "49152 tokens, the model 49151" in refusal(from_dir, home, shape(vocab_size=49151))
    (tmp_path / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    assert "480 tokens, the model 479" in refusal(from_dir, tmp_path, shape(vocab_size=479))


def test_an_id_beyond_the_model_is_refused_however_few_tokens_there_are(tmp_path):
    (tmp_path / "tokenizer.json").write_text(Fast(models.BPE({"a": 0, "b": 9}, [])).to_str())
    assert "10 tokens, the model 9" in refusal(from_dir, tmp_path, shape(vocab_size=9))


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_has_the_ids_it_has_within_the_whole_text(kind, kinds):
    words = kinds[kind]
    for whole in ("Hello world, how are you?", "The end.\n\nWhat is it?", "a 12 b ✓ c", "x  two spaces"):
        ids = words.encode(whole, special=False)
        for at in (i for i, c in enumerate(whole) if c in " \n" and whole[i - 1] not in " \n" and i):
            assert words.encode(whole[:at], special=False) + words.encode_more(whole[at:]) == ids
    assert words.encode_more("") == []


def with_added(tmp_path, added: dict) -> Tokenizer:
    """The small sentencepiece model with other added tokens."""
    model = train()
    (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return from_dir(tmp_path, ModelConfig.from_json({**SHAPE, "vocab_size": 500}, "config.json"))


def test_added_tokens_of_spaces_alone_split_nothing_else(tmp_path, sp):
    spaces = {"480": {"content": "    "}, "481": {"content": " x ", "lstrip": True, "rstrip": True}}
    tok = with_added(tmp_path, spaces)
    assert tok.encode_plain("hello world", False) == sp.EncodeAsIds("hello world")
    assert 480 in tok.encode_plain("a    b", False) and 481 in tok.encode_plain("a   x   b", False)


def test_an_added_token_may_rename_a_control_piece_but_no_ordinary_one(tmp_path, sp):
    tok = with_added(tmp_path, {"1": {"content": "<|begin|>", "special": True}})
    assert tok.encode_plain("<|begin|>", False) == [1]
    ordinary = next(i for i in range(300, 480) if not sp.IsControl(i))
    with pytest.raises(ValueError, match=f"the id {ordinary}, which is that of"):
        with_added(tmp_path, {str(ordinary): {"content": "<|begin|>"}})
    with pytest.raises(ValueError, match="the id 490, which is that of"):
        (tmp_path / "added_tokens.json").write_text('{"<|b|>": 490}')
        with_added(tmp_path, {"490": {"content": "<|a|>"}})
