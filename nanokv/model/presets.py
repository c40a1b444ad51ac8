"""The shapes of the named models, for --random-weights and for sizes before anything is downloaded."""

from __future__ import annotations

from dataclasses import replace

from nanokv.model.config import ModelConfig, RopeScaling

_LLAMA2 = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip

_LLAMA3 = replace(
    _LLAMA2, vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192,
    rope_theta=500000.0,
)  # fmt: skip

_SMOLLM2 = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
)  # fmt: skip

_LLAMA31 = replace(_LLAMA3, max_position_embeddings=131072, rope_scaling=RopeScaling("llama3", 8.0))

_MISTRAL = replace(
    _LLAMA2, model_type="mistral", vocab_size=32768, intermediate_size=14336, num_key_value_heads=8,
    max_position_embeddings=32768, rope_theta=1e6,
)  # fmt: skip

_QWEN25 = ModelConfig(
    model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, rms_norm_eps=1e-6,
    rope_theta=1e6, tie_word_embeddings=True, qkv_bias=True,
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": replace(
        _SMOLLM2, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5
    ),
    "smollm2-1.7b": replace(
        _SMOLLM2, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, rope_theta=130000.0,
    ),
    "tinyllama-1.1b": replace(
        _LLAMA2, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=2048,
    ),
    "llama2-7b": _LLAMA2,
    "llama2-13b": replace(
        _LLAMA2, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "llama3-8b": _LLAMA3,
    "llama3.1-8b": _LLAMA31,
    "llama3.2-1b": replace(
        _LLAMA31, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True,
        rope_scaling=RopeScaling("llama3", 32.0),
    ),
    "mistral-7b": _MISTRAL,
    "qwen2.5-coder-0.5b": _QWEN25,
    "qwen2.5-coder-1.5b": replace(
        _QWEN25, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, head_dim=128
    ),
    "mistral-7b-v0.1": replace(_MISTRAL, vocab_size=32000, rope_theta=10000.0, sliding_window=4096),
}  # fmt: skip
