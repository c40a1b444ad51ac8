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
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
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
    {"max_position_embeddings": MISSING},
    {"num_key_value_heads": None},
    {"architectures": MISSING},
    {"architectures": None},
    {"architectures": []},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"partial_rotary_factor": None},
    {"attention_bias": True},
    {"mlp_bias": True},
]
LLAMA = [
    {"num_key_value_heads": MISSING},
    {"head_dim": 16},
    {"head_dim": None},
    {"rms_norm_eps": MISSING},
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
SLIDING = {"use_sliding_window": True, "sliding_window": 32}
QWEN2 = [
    {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2},
    {"use_sliding_window": MISSING},
    {"use_sliding_window": MISSING, "sliding_window": 32, "max_window_layers": 0},
    {"num_key_value_heads": MISSING, "num_attention_heads": 32},
    {**SLIDING},
    {**SLIDING, "max_window_layers": 0},
    {**SLIDING, "max_window_layers": 1},
    {**SLIDING, "max_window_layers": 2},
    {**SLIDING, "max_window_layers": 1, "sliding_window": None},
    {**SLIDING, "max_window_layers": 1, "sliding_window": MISSING},
    {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    {**SLIDING, "layer_types": ["full_attention", "full_attention"], "max_window_layers": 0},
    {"use_sliding_window": False, "layer_types": ["full_attention", "full_attention"]},
    {"tie_word_embeddings": True},
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1000000.0},
]
QWEN3 = [{"head_dim": 16}, {"head_dim": 16, "attention_bias": True}]
CASES = [(kind, change) for kind in KINDS for change in EVERY]
for name, more in (("llama", LLAMA), ("mistral", MISTRAL), ("qwen2", QWEN2), ("qwen3", QWEN2 + QWEN3)):
    CASES += [(name, change) for change in more]


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
    window = getattr(theirs, "sliding_window", None)
    slides = [t == "sliding_attention" for t in getattr(theirs, "layer_types", [])] or [True] * 2
    assert [mine.window(i) for i in range(2)] == [window if x else None for x in slides]
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
