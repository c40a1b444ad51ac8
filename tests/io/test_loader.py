"""Checkpoints that are not what they should be: one line that names the fault, never a load, a hang or a traceback."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from helpers import edit, reconfigure, shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import text, write_tokenizer

from nanokv import load
from nanokv.backends.torch_ops import EAGER
from nanokv.model import loader
from nanokv.model.config import ModelConfig


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of a small checkpoint, to be damaged."""
    shutil.copytree(tiny("g3")[0], tmp_path / "m")
    return tmp_path / "m"


def refused(path, says: str) -> None:
    with pytest.raises(ValueError) as e:
        load(str(path), dtype="float32")
    assert says in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_shards_load_like_one_file(model, llm_of):
    shard(model)
    ids = text(20)
    assert torch.equal(load(str(model), dtype="float32").session(2).start([ids]), llm_of("g3").session(2).start([ids]))


def test_faults_of_tensors_are_named(model):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(model, lambda t: t.pop(name))
    refused(model, f"lacks 1 tensors, the first is {name}")
    edit(model, lambda t: t.update({name: torch.zeros(3, 5)}))
    refused(model, f"{name} has shape (3, 5), config.json asks for (32, 96)")
    edit(model, lambda t: t.update({name: torch.zeros(32, 96, dtype=torch.int32)}))
    refused(model, f"{name!r} is I32")
    edit(model, lambda t: t.update({name: torch.zeros(32, 96), "model.layers.9.mlp.up_proj.weight": torch.zeros(2)}))
    refused(model, "holds 'model.layers.9.mlp.up_proj.weight', which is not a tensor of this model")


def test_harmless_extras_are_passed_over(model, llm_of):
    at = "model.layers.0.self_attn"
    extras = {f"{at}.rotary_emb.inv_freq": torch.zeros(8), f"{at}.rotary_emb.cos_cached": torch.zeros(1, 1, 9, 8)}
    extras |= {f"{at}.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool), f"{at}.masked_bias": torch.tensor(-1e9)}
    extras |= {
        f"{at}.k_scale": torch.ones(1),
        f"{at}.v_scale": torch.ones(1),
        "v_head.summary.weight": torch.ones(1, 96),
    }
    extras |= {"model.causal_mask": torch.ones(9, 9, dtype=torch.bool), "model.position_ids": torch.arange(9)}
    edit(model, lambda t: t.update(extras))
    same_logits(model, llm_of("g3"))


def test_a_checkpoint_saved_without_its_head_class_is_read(model, llm_of):
    tensors = load_file(model / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, model / "model.safetensors")
    same_logits(model, llm_of("g3"))
    (model / "model.safetensors").rename(model / "weights.safetensors")
    same_logits(model, llm_of("g3"))


def test_a_truncated_file_is_refused(model):
    data = (model / "model.safetensors").read_bytes()
    for n in (len(data) - 1, len(data) // 2, 100, 7, 0):
        (model / "model.safetensors").write_bytes(data[:n])
        refused(model, "is not a complete safetensors file")


def test_faults_of_shards_are_named(model):
    where = shard(model)
    (model / "b.safetensors").rename(model / "c")
    refused(model, "lacks the shard b.safetensors")
    (model / "c").rename(model / "b.safetensors")
    index = model / "model.safetensors.index.json"
    for outside in ("../b.safetensors", "/etc/b.safetensors", "x/b.safetensors", "..", "a\\b.safetensors"):
        index.write_text(json.dumps({"weight_map": {**where, "lm_head.weight": outside}}))
        refused(model, "outside the model's directory; refused")
    index.write_text(json.dumps({"weight_map": {**where, "lm_head.weight": "pytorch_model.bin"}}))
    refused(model, "only .safetensors shards are read")
    index.write_text(
        json.dumps({"weight_map": {**where, "model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}})
    )
    refused(model, "which model.safetensors.index.json puts there")
    index.write_text("[]")
    refused(model, "an object is expected")
    index.write_text("{}")
    refused(model, "has no weight_map")


# ---- what lies beside the weights ----


def strays(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Files that real directories hold beside a model's weights."""
    k = "layers.0.self_attn.k_proj"
    return {
        "consolidated.safetensors": {"layers.0.attention.wk.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)},
        "adapter_model.safetensors": {f"base_model.model.model.{k}.lora_A.weight": torch.ones(2, 2)},
        "adapters.safetensors": {f"model.{k}.lora_a": torch.ones(2, 2)},
        "optimizer.safetensors": {f"exp_avg.model.{k}.weight": torch.ones(2, 2)},
    }


def same_logits(path, llm) -> None:
    ids = text(20)
    assert torch.equal(load(str(path), dtype="float32").session(2).start([ids]), llm.session(2).start([ids]))


@pytest.mark.parametrize("weights", ["model.safetensors", "weights.safetensors", "indexed", "unindexed"])
def test_strays_beside_the_weights_are_passed_over(weights, model, llm_of):
    tensors = load_file(model / "model.safetensors")
    if weights.endswith("indexed"):
        shard(model, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
        save_file(tensors, model / "second-copy.safetensors")
        if weights == "unindexed":
            (model / "model.safetensors.index.json").unlink()
    else:
        (model / "model.safetensors").rename(model / weights)
    for name, held in strays(tensors).items():
        save_file(held, model / name)
    (model / "training_args.bin").write_bytes(b"pickle")
    same_logits(model, llm_of("g3"))


@pytest.mark.parametrize("index", ['{"weight_map": {"x": "model-00001-of-00009.safetensors"}}', "[]", "no JSON"])
def test_a_stale_index_beside_model_safetensors_is_passed_over(index, model, llm_of):
    (model / "model.safetensors.index.json").write_text(index)
    save_file({"model.norm.weight": torch.zeros(96)}, model / "model-00001-of-00002.safetensors")
    same_logits(model, llm_of("g3"))


def test_of_two_copies_neither_is_chosen(model):
    (model / "model.safetensors").rename(model / "a.safetensors")
    shutil.copy(model / "a.safetensors", model / "b.safetensors")
    refused(model, "a.safetensors and b.safetensors both hold lm_head.weight; move one of the two away")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adapter_model.safetensors", "is a LoRA adapter, not a model"),
        ("adapters.safetensors", "is a LoRA adapter, not a model"),
        ("consolidated.safetensors", "has the names of Mistral's own format"),
        ("optimizer.safetensors", "and no weights of a supported model"),
    ],
)
def test_a_directory_of_strays_alone_is_refused_by_name(name, says, model):
    held = strays(load_file(model / "model.safetensors"))[name]
    (model / "model.safetensors").unlink()
    save_file(held, model / name)
    refused(model, f"{name} {says}" if name != "optimizer.safetensors" else says)


def test_weights_of_mlx_are_refused_by_name(model):
    reconfigure(model, quantization={"group_size": 64, "bits": 4})
    refused(model, "the weights are quantised by MLX")
    reconfigure(model, quantization=...)
    (model / "model.safetensors").rename(model / "weights.npz")
    refused(model, "MLX's own format (weights.npz)")


# ---- spellings of config.json that are beside the numbers ----


@pytest.mark.parametrize("names", [None, [], ["LLaMAForCausalLM"], ["SomethingElse", "LlamaForCausalLM"], ...])
def test_the_architecture_is_found_where_it_can_be(names, model, llm_of):
    reconfigure(model, architectures=names)
    same_logits(model, llm_of("g3"))


def test_model_type_decides_between_architectures(model):
    reconfigure(model, architectures=["MistralForCausalLM", "LlamaForCausalLM"])
    assert load(str(model)).config.model_type == "llama"
    reconfigure(model, architectures=["LlamaModel"])
    refused(model, "architecture LlamaModel is not supported")
    reconfigure(model, architectures=..., model_type="gemma")
    refused(model, "architecture model_type gemma is not supported")
    reconfigure(model, architectures="LlamaForCausalLM")
    refused(model, "architectures is 'LlamaForCausalLM'; it must be a list")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_byte_order_mark_changes_nothing(file, model, llm_of):
    before = (model / file).read_bytes() if (model / file).is_file() else b"{}"
    (model / file).write_bytes(b"\xef\xbb\xbf" + before)
    same_logits(model, llm_of("g3"))


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "words", "context"),
    [
        ({}, {}, 512),
        ({"rope_scaling": LINEAR}, {}, 512),
        ({"rope_scaling": LINEAR}, {"model_max_length": 2048}, 2048),
        ({"rope_scaling": LINEAR}, {"model_max_length": 512}, 512),
        ({"rope_scaling": LINEAR}, {"model_max_length": 10**30}, 512),
        ({"rope_scaling": LINEAR, "max_sequence_length": 2048}, {}, 2048),
        ({"rope_scaling": LINEAR, "max_sequence_length": 512}, {}, 512),
        ({"rope_scaling": {**LINEAR, "original_max_position_embeddings": 512}}, {}, 2048),
        ({"rope_scaling": {**LINEAR, "original_max_position_embeddings": 128}}, {}, 512),
        ({"rope_scaling": {**LINEAR, "original_max_position_embeddings": 128}}, {"model_max_length": 512}, 512),
        ({}, {"model_max_length": 2048}, 512),
    ],
)
def test_linear_scaling_lengthens_the_context_only_if_a_file_says_so(config, words, context, model):
    reconfigure(model, rope_parameters=..., **config)
    (model / "tokenizer_config.json").write_text(json.dumps(words))
    assert ModelConfig.from_dir(model).max_position_embeddings == context


def test_a_pickle_is_refused_by_name(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, "only pickled weights (pytorch_model.bin), which can run code")
    (model / "pytorch_model.bin").unlink()
    refused(model, "has no *.safetensors")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported; supported are LlamaForCausalLM",
        ),
        (
            {"architectures": ["DeepseekV3ForCausalLM"]},
            "DeepseekV3ForCausalLM is not supported (its attention (MLA) caches one latent vector",
        ),
        ({"architectures": None, "model_type": "rwkv6"}, "rwkv6 is not supported (a recurrent state of fixed size"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling type 'yarn' is not supported"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": ...}, "vocab_size is None"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"eos_token_id": "</s>"}, "token id '</s>' must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_faults_of_the_config_are_named(model, values, says):
    reconfigure(model, **values)
    refused(model, says)


def test_a_config_that_is_no_json_is_named(model):
    for raw in (b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100000):
        (model / "config.json").write_bytes(raw)
        refused(model, "config.json")
    (model / "config.json").unlink()
    refused(model, "has no config.json")


def test_both_spellings_of_rope_read_the_same(tiny):
    raw = json.loads((tiny("llama31")[0] / "config.json").read_text())
    new = ModelConfig.from_json(raw, "x")
    scaling = dict(raw.pop("rope_parameters"))
    old = ModelConfig.from_json({**raw, "rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}, "x")
    assert old == new and old.rope_scaling.factor == 8.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(directory, header as a dict, raw header, data) of a one-layer checkpoint."""
    path = tmp_path_factory.mktemp("whole")
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    model = loader.empty(ModelConfig.from_json(config, "x"), EAGER, torch.device("cpu"), torch.float32)
    loader.randomise(model)
    loader.save(model, path, config)
    write_tokenizer(path)
    raw = (path / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return path, json.loads(raw[8 : 8 + n]), raw[8 : 8 + n], raw[8 + n :]


@st.composite
def damage(draw, header: dict, raw: bytes):
    """A header that is not the checkpoint's: bytes replaced, cut or added, a wrong length, or a field changed."""
    kind = draw(st.sampled_from(["bytes", "cut", "length", "field", "field", "field"]))
    if kind == "bytes":
        at = draw(st.integers(0, len(raw) - 1))
        new = draw(st.binary(min_size=1, max_size=4))
        return raw[:at] + new + raw[at + len(new) :], None
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))], None
    if kind == "length":
        return raw, draw(st.one_of(st.integers(0, 2 * len(raw)), st.integers(0, 2**64 - 1)))
    changed = json.loads(json.dumps(header))
    name = draw(st.sampled_from(sorted(changed)))
    what = draw(st.sampled_from(["drop", "dtype", "shape", "begin", "end", "rename", "type"]))
    entry = changed[name]
    if what == "drop":
        del changed[name]
    elif what == "rename":
        changed[draw(st.text(max_size=12))] = changed.pop(name)
    elif what == "type":
        changed[name] = draw(st.sampled_from([None, 1, [], {}, "x", {"dtype": "F32"}]))
    elif what == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "", "f32", 3]))
    elif what == "shape":
        entry["shape"] = draw(st.lists(st.integers(-2, 2**40), max_size=3))
    else:
        at = ["begin", "end"].index(what)
        entry["data_offsets"][at] = draw(st.integers(-4, 2**40))
    return json.dumps(changed).encode(), None


@settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_header_never_loads(data, whole, tmp_path_factory):
    path, header, raw, values = whole
    bad, length = data.draw(damage(header, raw))
    length = len(bad) if length is None else length
    try:  # white space or the order of keys may change without any harm
        same = json.loads(bad[:length]) == header and length == len(bad)
    except ValueError:
        same = False
    if same:
        return
    broken = path.parent / "broken"
    shutil.copytree(path, broken, dirs_exist_ok=True)
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", length) + bad + values)
    config = ModelConfig.from_dir(broken)
    with pytest.raises(ValueError) as e:
        loader.load(broken, config, EAGER, torch.device("cpu"), torch.float32)
    assert "\n" not in str(e.value)
