"""GGUF files: what llama.cpp's converter writes, read back as the same model. Oracles: transformers, llama.cpp's own formulas."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from helpers import first
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from nanokv import load
from nanokv.model.config import ModelConfig, RopeScaling
from weights.from_gguf import GGUF, convert, unpermute

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [(a, b) for a in "Ġtaoinsh" for b in "eato"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [a + b for a, b in MERGES]
SHAPE = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter has it."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def make(family: str = "Llama", **shape) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **shape}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)  # ones would hide a norm in the wrong place
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, 0, 0.5)
    return model.requires_grad_(False)


def round_to(model: PreTrainedModel, kind: Kind) -> PreTrainedModel:
    """Give the model's matrices the values that they have in a file of this kind."""
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind).copy()))
    return model


def tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights named and ordered as in llama.cpp, whose converter reorders Q and K of llama alone."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    heads = heads if model.config.model_type == "llama" else {}
    out = {}
    for name, weight in model.state_dict().items():
        layer, part, kind = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.*)\.(weight|bias)", name).groups()
        part = NAMES[part]
        if part == "output" and model.config.tie_word_embeddings:
            continue
        value = weight.numpy()
        value = permute(value, heads[part]) if part in heads else value
        out[f"{part}.{kind}" if layer is None else f"blk.{layer}.{part}.{kind}"] = value
    return out


def metadata(config: PreTrainedConfig) -> dict:
    rope = getattr(config, "rope_parameters", None) or vars(config)  # of transformers 5, of 4
    meta = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": rope["rope_theta"],
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(m) for m in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {k.replace("llama.", f"{config.model_type}."): v for k, v in meta.items()}


def write(
    file: Path, model: PreTrainedModel, kind: Kind = Kind.F32, meta: dict | None = None, extra: dict | None = None
) -> str:
    """The model as a GGUF file; meta: metadata to change, None takes a key away; extra: tensors to add."""
    meta = {**metadata(model.config), **(meta or {})}
    writer = gguf.GGUFWriter(file, meta.pop("general.architecture", model.config.model_type))
    for key, value in meta.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, value in {**tensors(model), **(extra or {})}.items():
        form = kind if value.ndim == 2 else Kind.F32  # vectors stay fp32 whatever the file's kind
        writer.add_tensor(name, quantize(value, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def prompt(n: int = 40) -> list[int]:
    return torch.randint(0, len(TOKENS), (n,), generator=torch.Generator().manual_seed(n)).tolist()


def ours(path: str, ids: list[int]) -> torch.Tensor:
    return load(path, dtype="float32").session(8).start([ids])[0]


def theirs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def same(a: torch.Tensor, b: torch.Tensor, error: float = 1e-4) -> None:
    assert b.std() > 0.1, "the oracle's logits say nothing"
    torch.testing.assert_close(a, b, atol=error, rtol=error)


def refusal(path: str) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(ValueError) as e:
        load(path, dtype="float32")
    assert "\n" not in str(e.value)
    assert Path(path).name in str(e.value)
    return str(e.value)


def divisors(theta: float, dim: int, factor: float) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter works it out for Llama 3.1."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < 8192 / 4.0:
            out.append(1.0)
        elif wavelength > 8192 / 1.0:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("shape", [(64, 64), (32, 64), (64,)])
def test_unpermute_undoes_what_the_converter_does_to_q_and_k(shape):
    x = np.random.default_rng(0).normal(size=shape)
    for heads in (1, 2, 4):
        assert (unpermute(permute(x, heads), heads) == x).all()
    assert (permute(x, 4) != x).any()


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1], ids=lambda k: k.name
)
def test_a_file_of_each_kind_gives_the_logits_of_its_dequantised_weights(tmp_path, kind):
    model = make()
    path = write(tmp_path / "tiny.gguf", model, kind)
    same(ours(path, prompt()), theirs(round_to(model, kind), prompt()))


FAMILIES = {
    "Llama": {"attention_bias": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("converted", [False, True])
def test_a_file_of_each_architecture_gives_the_logits_of_its_model(tmp_path, family, converted):
    model = make(family, **FAMILIES[family])
    meta = {"qwen2.attention.key_length": None, "qwen2.rope.dimension_count": None, "qwen3.rope.dimension_count": None}
    path = write(tmp_path / "tiny.gguf", model, Kind.F16, meta=meta)
    right = theirs(round_to(model, Kind.F16), prompt())
    if converted:
        convert(Path(path), tmp_path / "out")
        path = str(tmp_path / "out")
        oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        same(theirs(oracle, prompt()), right)
    same(ours(path, prompt()), right)


# bytes per block of 256 weights (32 for the last one), and where its fp16 scales lie
BLOCKS = {
    Kind.Q2_K: (84, (80, 82)), Kind.Q3_K: (110, (108,)), Kind.Q4_K: (144, (0, 2)), Kind.Q5_K: (176, (0, 2)),
    Kind.Q6_K: (210, (208,)), Kind.IQ4_XS: (136, (0,)), Kind.IQ4_NL: (18, (0,)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: k.name)
@pytest.mark.parametrize("family", first(1, ["Llama", "Qwen2"]))
def test_the_reader_of_transformers_agrees_on_files_of_every_quantisation(tmp_path, kind, family):
    """The blocks hold random codes and small scales: the gguf library reads these formats and writes few of them."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    path = write_blocks(tmp_path / "tiny.gguf", make(family, **shape), kind)
    oracle = make(family, **shape)
    oracle.load_state_dict(load_gguf_checkpoint(path, return_tensors=True, model_to_load=oracle)["tensors"])
    same(ours(path, prompt()), theirs(oracle, prompt()), 1e-3)


def write_blocks(file: Path, model: PreTrainedModel, kind: Kind) -> str:
    dice, (size, scales) = np.random.default_rng(0), BLOCKS[kind]
    per_block = gguf.GGML_QUANT_SIZES[kind][0]

    def blocks(rows: int, columns: int) -> np.ndarray:
        codes = dice.integers(0, 256, (rows, columns // per_block, size), dtype=np.uint8)
        for at in scales:
            values = dice.uniform(1e-4, 3e-4, (rows, columns // per_block, 1)).astype(np.float16)
            codes[:, :, at : at + 2] = values.view(np.uint8)
        return codes.reshape(rows, -1)

    writer = gguf.GGUFWriter(file, model.config.model_type)
    for key, value in metadata(model.config).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array)(key, value)
    for name, value in tensors(model).items():
        if value.ndim == 2:
            writer.add_tensor(name, blocks(*value.shape), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def split(file: Path, model: PreTrainedModel, count: int = 3) -> list[Path]:
    """As llama.cpp's gguf-split writes a model: the metadata in the first part, tensors in all of them."""
    every = list(tensors(model).items())
    parts = [file.with_name(f"{file.stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for i, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        for key, value in metadata(model.config).items() if i == 0 else ():
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_array)(key, value)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(every))
        for name, value in every[i::count]:
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_a_split_model_is_read_from_any_of_its_parts(tmp_path):
    model = make()
    parts = split(tmp_path / "tiny.gguf", model)
    for part in (parts[0], parts[2]):
        same(ours(str(part), prompt()), theirs(model, prompt()))
    parts[1].rename(tmp_path / "away.gguf")
    assert "tiny-00002-of-00003.gguf is not beside it" in refusal(str(parts[0]))
    parts[0].rename(tmp_path / "other.gguf")
    assert "has another name than NAME-00001-of-00003.gguf" in refusal(str(tmp_path / "other.gguf"))


def test_a_gguf_file_is_known_by_its_content_and_not_by_its_name(tmp_path):
    path = Path(write(tmp_path / "tiny.gguf", make()))
    blob = path.rename(tmp_path / "sha256-0123")
    same(ours(str(blob), prompt()), theirs(make(), prompt()))


def test_an_adapter_is_refused_by_name(tmp_path):
    meta = {"general.type": "adapter", "adapter.type": "lora"}
    assert "is a LoRA adapter, not a model" in refusal(write(tmp_path / "tiny.gguf", make(), meta=meta))
    assert "is of type 'mmproj'" in refusal(write(tmp_path / "tiny.gguf", make(), meta={"general.type": "mmproj"}))


def test_what_other_converters_write_differently_is_read(tmp_path):
    model = make(mlp_bias=True)
    meta = {"llama.attention.head_count": [4, 4], "llama.feed_forward_length": [96, 96]}
    meta |= {"tokenizer.ggml.padding_token_id": 2**32 - 1, "tokenizer.ggml.unknown_token_id": len(TOKENS)}
    meta["tokenizer.ggml.token_type"] = None
    extra = {"blk.0.attn_rot_embd": np.zeros(8, np.float32)}
    same(ours(write(tmp_path / "tiny.gguf", model, meta=meta, extra=extra), prompt()), theirs(model, prompt()))


def test_rows_of_the_embedding_beyond_the_tokens_are_read(tmp_path):
    model = make(vocab_size=len(TOKENS) + 9)
    same(ours(write(tmp_path / "tiny.gguf", model), prompt()), theirs(model, prompt()))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0], ids=lambda k: k.name)
def test_the_reader_of_transformers_agrees(tmp_path, kind):
    path = write(tmp_path / "tiny.gguf", make(), kind)
    oracle = make().requires_grad_(False)
    for weight in oracle.parameters():
        weight.zero_()
    # what from_pretrained(gguf_file=...) calls; that itself wants a package more
    oracle.load_state_dict(load_gguf_checkpoint(path, return_tensors=True, model_to_load=oracle)["tensors"])
    same(ours(path, prompt()), theirs(oracle, prompt()))


@pytest.mark.parametrize(
    "shape",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 32}, {"rms_norm_eps": 1e-6}],
    ids=str,
)
def test_other_shapes_give_the_same_logits(tmp_path, shape):
    model = make(**shape)
    same(ours(write(tmp_path / "tiny.gguf", model), prompt()), theirs(model, prompt()))


def test_a_file_without_an_output_matrix_ties_the_head_to_the_embedding(tmp_path):
    model = make(tie_word_embeddings=True)
    path = write(tmp_path / "tiny.gguf", model)
    assert load(path, dtype="float32").config.tie_word_embeddings
    same(ours(path, prompt()), theirs(model, prompt()))


def test_a_file_with_an_output_matrix_has_a_head_of_its_own(tmp_path):
    assert not GGUF(Path(write(tmp_path / "tiny.gguf", make()))).config()["tie_word_embeddings"]


def test_what_old_files_leave_out_has_the_values_of_llama_cpp(tmp_path):
    model = make(num_key_value_heads=4, rope_theta=10000.0)
    gone = ["attention.head_count_kv", "attention.key_length", "rope.dimension_count", "rope.freq_base", "vocab_size"]
    path = write(tmp_path / "tiny.gguf", model, meta={f"llama.{key}": None for key in gone})
    same(ours(path, prompt()), theirs(model, prompt()))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0], ids=lambda k: k.name)
def test_a_converted_directory_gives_the_same_logits(tmp_path, kind):
    path = write(tmp_path / "tiny.gguf", make(), kind)
    convert(Path(path), tmp_path / "out")
    same(ours(str(tmp_path / "out"), prompt()), ours(path, prompt()), 1e-4 if kind == Kind.F16 else 3e-2)


def test_a_converted_directory_is_one_that_transformers_reads_alike(tmp_path):
    convert(Path(write(tmp_path / "tiny.gguf", make(), Kind.F16)), tmp_path / "out")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    same(ours(str(tmp_path / "out"), prompt()), theirs(oracle, prompt()))


def test_weights_beyond_the_range_of_fp16_survive_conversion(tmp_path):
    model = make()
    model.model.embed_tokens.weight[5, 7] = 1e5
    convert(Path(write(tmp_path / "tiny.gguf", model)), tmp_path / "out")
    same(ours(str(tmp_path / "out"), [5]), theirs(model, [5]), 3e-2)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0], ids=lambda k: k.name)
def test_what_is_read_may_be_written_to(tmp_path, kind):
    """torch warns on stderr of arrays that are not."""
    file = GGUF(Path(write(tmp_path / "tiny.gguf", make(), kind)))
    assert all(read().flags.writeable for _, _, read in file.tensors())


def test_the_tokenizer_of_the_file_splits_digits_and_knows_its_special_tokens(tmp_path):
    words = load(write(tmp_path / "tiny.gguf", make()), dtype="float32").tokenizer
    text = "<|im_start|>to the 42 hats<|im_end|>"
    pieces = ["<|im_start|>", "to", "Ġt", "he", "Ġ", "4", "2", "Ġ", "h", "at", "s", "<|im_end|>"]
    assert [TOKENS[i] for i in words.encode(text)] == pieces
    assert words.decode(words.encode(text)) == "to the 42 hats"


@pytest.mark.parametrize("pre, cut", [("gpt-2", "12"), ("smollm", "1"), ("qwen2", "1"), ("llama-bpe", "123")])
def test_each_pre_tokenizer_cuts_numbers_its_way(tmp_path, pre, cut):
    """The longest token of digits that can come about: `12345` with merges that would join three of them."""
    merges = [("1", "2"), ("12", "3")] if pre != "gpt-2" else [("1", "2")]
    tokens = TOKENS + [a + b for a, b in merges]
    meta = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.token_type": [1] * len(tokens),
    }
    words = load(write(tmp_path / "tiny.gguf", make(vocab_size=len(tokens)), meta=meta), dtype="float32").tokenizer
    assert tokens[words.encode("12345", special=False)[0]] == cut


@pytest.mark.parametrize("pre, pieces", [("llama-bpe", ["xyz"]), ("smollm", ["x", "y", "z"])])
def test_only_llama_3_takes_a_word_of_the_vocabulary_whole_without_a_merge(tmp_path, pre, pieces):
    tokens = [*TOKENS, "xyz"]
    meta = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    words = load(write(tmp_path / "tiny.gguf", make(vocab_size=len(tokens)), meta=meta), dtype="float32").tokenizer
    assert [tokens[i] for i in words.encode("xyz", special=False)] == pieces


def test_a_file_that_names_no_pre_tokenizer_is_read_by_what_else_it_holds_and_says_so(tmp_path):
    def words(arch: str, tokens: list[str], **meta):
        names = metadata(make(vocab_size=len(tokens)).config).items()
        names = {k.replace("llama.", f"{arch}."): v for k, v in names}
        meta = {**names, "tokenizer.ggml.pre": None, "tokenizer.ggml.tokens": tokens, **meta}
        meta |= {"tokenizer.ggml.token_type": [1] * len(tokens), "general.architecture": arch}
        file = GGUF(Path(write(tmp_path / "tiny.gguf", make(vocab_size=len(tokens)), meta=meta)))
        return file.pre, file.notes

    spare = [f"<spare{i}>" for i in range(5)]
    assert words("qwen2", TOKENS)[0] == "qwen2" and words("qwen3", TOKENS)[0] == "qwen2"
    assert words("llama", [*TOKENS, "<|begin_of_text|>"])[0] == "llama-bpe"
    pre, notes = words("llama", [*TOKENS, *spare])
    assert pre == "default" and "tiny.gguf does not say how it splits text" in notes[0]
    assert words("llama", TOKENS, **{"tokenizer.ggml.pre": "smollm"}) == ("smollm", [])


@pytest.mark.parametrize("pre, adds", [("llama-bpe", True), ("smollm", False)])
def test_llama_3_begins_with_bos_where_the_file_leaves_it_open(tmp_path, pre, adds):
    words = load(write(tmp_path / "tiny.gguf", make(), meta={"tokenizer.ggml.pre": pre}), dtype="float32").tokenizer
    assert (words.encode("to")[0] == 1) == adds
    assert words.encode("to", special=False)[0] != 1


def test_every_id_that_ends_a_text_is_an_eos(tmp_path):
    meta = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 7}
    llm = load(write(tmp_path / "tiny.gguf", make(), meta=meta), dtype="float32")
    assert set(llm.tokenizer.eos) == {0, 7, TOKENS.index("<|im_end|>")}


def test_the_chat_template_of_the_file_is_used(tmp_path):
    meta = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"}
    llm = load(write(tmp_path / "tiny.gguf", make(), meta=meta), dtype="float32")
    assert llm.tokenizer.chat([{"role": "user", "content": "hi"}]) == "<|im_start|>hi"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_of_llama_3_1_are_recognised(tmp_path, factor):
    rope = {"rope_type": "llama3", "factor": factor, **LLAMA31}
    model = make(head_dim=64, rope_theta=500000.0, rope_scaling=rope, max_position_embeddings=131072)
    freqs = divisors(500000.0, 64, factor)
    assert len(set(freqs.tolist())) > 3  # the ramp is in it
    path = write(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": freqs})
    assert load(path, dtype="float32").config.rope_scaling == RopeScaling("llama3", factor)
    same(ours(path, prompt(400)), theirs(model, prompt(400)))


def test_other_rope_freqs_are_refused(tmp_path):
    freqs = divisors(50000.0, 16, 8.0)
    write(tmp_path / "tiny.gguf", make(), extra={"rope_freqs.weight": freqs})
    assert GGUF(tmp_path / "tiny.gguf").config()["rope_scaling"]["rope_type"] == "llama3"
    freqs[3] *= 1.015
    assert "rope_freqs" in refusal(write(tmp_path / "tiny.gguf", make(), extra={"rope_freqs.weight": freqs}))


def test_rope_freqs_with_another_scaling_are_refused(tmp_path):
    meta = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    extra = {"rope_freqs.weight": divisors(50000.0, 16, 8.0)}
    assert "rope_freqs" in refusal(write(tmp_path / "tiny.gguf", make(), meta=meta, extra=extra))


@pytest.mark.parametrize("meta", [{"llama.rope.scaling.type": "none"}, {"llama.rope.scaling.factor": 1.0}], ids=str)
def test_no_rope_scaling_is_none(tmp_path, meta):
    assert GGUF(Path(write(tmp_path / "tiny.gguf", make(), meta=meta))).config()["rope_scaling"] is None


@pytest.mark.parametrize(
    "meta",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
    ids=str,
)
def test_linear_rope_scaling_is_followed_however_it_is_said(tmp_path, meta):
    model = make(rope_scaling={"rope_type": "linear", "factor": 4.0})
    path = write(tmp_path / "tiny.gguf", model, meta=meta)
    assert load(path, dtype="float32").config.rope_scaling == RopeScaling("linear", 4.0)
    same(ours(path, prompt()), theirs(model, prompt()))


@pytest.mark.parametrize(
    "meta, word",
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "yarn"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"general.architecture": "gemma"}, "gemma"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.eos_token_id": 100000}, "eos_token_id"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.attention.head_count": "four"}, "llama.attention.head_count"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_followed_is_refused_in_one_line(tmp_path, meta, word):
    assert word in refusal(write(tmp_path / "tiny.gguf", make(), meta=meta))


def test_a_file_with_more_layers_than_it_says_is_refused(tmp_path):
    assert "model.layers.1" in refusal(write(tmp_path / "tiny.gguf", make(), meta={"llama.block_count": 1}))


def test_a_file_with_fewer_layers_than_it_says_is_refused(tmp_path):
    assert "model.layers.2" in refusal(write(tmp_path / "tiny.gguf", make(), meta={"llama.block_count": 3}))


def test_a_tensor_of_no_llama_is_refused_by_name(tmp_path):
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((8, 64), np.float32)}
    assert "blk.0.ffn_gate_inp.weight" in refusal(write(tmp_path / "tiny.gguf", make(), extra=extra))


def test_a_kind_that_cannot_be_dequantised_is_refused_by_name(tmp_path, monkeypatch):
    path = write(tmp_path / "tiny.gguf", make(), Kind.Q8_0)
    monkeypatch.delitem(gguf.quants._type_traits, Kind.Q8_0)
    assert "Q8_0" in refusal(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = Path(write(tmp_path / "tiny.gguf", make())).read_bytes()
    file = tmp_path / "cut.gguf"
    for n in [0, 3, 4, 20, 24, 100, 1000, 5000, 10000, *np.linspace(12000, len(whole) - 1, 20, dtype=int)]:
        file.write_bytes(whole[:n])
        assert "fetch it again" in refusal(str(file)), n


def test_a_file_that_is_something_else_is_refused(tmp_path):
    file = tmp_path / "tiny.gguf"
    starts = {b"GG": "not a complete GGUF", b"<html>": "not a complete GGUF", b"tjgg\3\0\0\0": "GGML format"}
    starts |= {b"version https://git-lfs.github.com/spec/v1\n": "Git LFS pointer", b"PK\3\4": "can run code"}
    starts |= {(99).to_bytes(8, "little") + b'{"a"': "give the directory that holds it"}
    for start, words in starts.items():
        file.write_bytes(start + b"x" * 99)
        assert words in refusal(str(file))


def test_config_json_of_a_file_is_one_that_nanokv_reads(tmp_path):
    convert(Path(write(tmp_path / "tiny.gguf", make())), tmp_path / "out")
    config = ModelConfig.from_dir(tmp_path / "out")
    assert (config.rms_norm_eps, config.rope_theta, config.head_dim) == (1e-5, 50000.0, 16)
    assert (config.bos_token_id, config.eos_token_id) == (1, (2, 0))
