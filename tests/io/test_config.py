"""config.json in the spellings of real checkpoints, read as transformers reads them: config by config."""

from __future__ import annotations

import json

import pytest
import torch

from nanokv.model.config import ModelConfig
from nanokv.model.rope import inverse_frequencies

BASE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
KINDS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MISSING = object()  # the field is left out
# what is changed in BASE, for every kind of model
EVERY = [
    {},
    {"rope_theta": MISSING},
    {"rope_theta": 10000},
    {"rope_theta": 500000},
    {"rope_theta": 1e6, "rope_scaling": None},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 250000.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 250000},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 75000.0}},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "rope_theta": 300000.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 80000.0}},
    {"rope_parameters": {"rope_theta": 80000}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 80000.0}, "rope_theta": 500000.0},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 80000.0}},
    {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "rope_theta": 500000.0}},
    {"rope_parameters": None, "rope_theta": 40000.0},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 40000.0},
]
LLAMA = [
    {"num_key_value_heads": MISSING},
    {"num_key_value_heads": None},
    {"head_dim": 16},
    {"head_dim": None},
    {"rms_norm_eps": MISSING},
    {"max_position_embeddings": MISSING},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_bias": False, "mlp_bias": False},
    {"torch_dtype": "float16", "use_cache": False, "pretraining_tp": 1},
    {"dtype": "bfloat16", "transformers_version": "5.0.0"},
]
MISTRAL = [
    {"num_key_value_heads": MISSING},
    {"sliding_window": None},
    {"sliding_window": 32},
    {"sliding_window": MISSING},
    {"head_dim": None},
]
QWEN2 = [
    {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2},
    {"use_sliding_window": MISSING},
    {"tie_word_embeddings": True},
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1000000.0},
]
CASES = [(kind, change) for kind in KINDS for change in EVERY]
CASES += [
    (kind, change) for kind, more in (("llama", LLAMA), ("mistral", MISTRAL), ("qwen2", QWEN2)) for change in more
]


def raw(kind: str, change: dict) -> dict:
    return {k: v for k, v in {**BASE, **KINDS[kind], **change}.items() if v is not MISSING}


@pytest.mark.parametrize(
    ("kind", "change"), CASES, ids=lambda x: x if isinstance(x, str) else json.dumps(x, default=lambda _: "-")
)
def test_a_config_is_read_as_transformers_reads_it(kind, change, tmp_path):
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(raw(kind, change)))
    mine, theirs = ModelConfig.from_dir(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*names, "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert mine.tie_word_embeddings == bool(theirs.tie_word_embeddings)
    assert mine.sliding_window == (theirs.sliding_window if kind == "mistral" else None)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    torch.testing.assert_close(inverse_frequencies(mine), rotary.inv_freq, atol=0, rtol=1e-6)
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert mine.qkv_bias == (attention.q_proj.bias is not None) and mine.o_bias == (attention.o_proj.bias is not None)
    assert mine.mlp_bias == (mlp.up_proj.bias is not None)


def test_there_are_sixty_spellings():
    assert len(CASES) >= 60


@pytest.mark.parametrize("kind", KINDS)
def test_theta_by_kind_of_layer_is_read_if_all_agree(kind, tmp_path):
    same = {"rope_type": "default", "rope_theta": 70000.0}
    (tmp_path / "config.json").write_text(json.dumps(raw(kind, {"rope_parameters": {"full_attention": same}})))
    assert ModelConfig.from_dir(tmp_path).rope_theta == 70000.0
    other = {"full_attention": same, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw(kind, {"rope_parameters": other})))
    with pytest.raises(ValueError, match="rope_parameters differ between kinds of layers"):
        ModelConfig.from_dir(tmp_path)
