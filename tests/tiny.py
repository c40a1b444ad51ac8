"""The shapes of the tiny checkpoints, and what they need beside weights. Imports nothing of nanokv."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

VARIANTS = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama31": ("Llama", {"rope_theta": 500000.0, "rope_scaling": {**LLAMA31, "original_max_position_embeddings": 64}}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "g3": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 96}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "window-1": ("Mistral", {"sliding_window": 1}),
    "mistral-v2": ("Mistral", {"sliding_window": None}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "head-dim": ("Llama", {"head_dim": 32}),
    "bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "deep": ("Llama", {"num_hidden_layers": 8, "initializer_range": 0.1}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "windows": ("Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
}


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer.json of 96 tokens: every printable ASCII character is one, and the newline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {chr(i): i - 32 for i in range(33, 127)} | {"Ġ": 0, "Ċ": 95}
    tok = Tokenizer(models.BPE(vocab, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.save(str(path / "tokenizer.json"))


def text(n: int, seed: int = 0, vocab: int = 96) -> list[int]:
    """n random token ids."""
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def write_seeded(path: Path, **changes: Any) -> None:
    """A checkpoint of TINY's shape whose weights depend on nothing but a seed, so that results of it can be stored."""
    from safetensors.torch import save_file

    path.mkdir()
    config = {**TINY, **changes}
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    dice, size = torch.Generator().manual_seed(7), config["initializer_range"]
    weights = {f"{k}.weight": size * torch.randn(s, generator=dice) + (len(s) == 1) for k, s in shapes.items()}
    save_file(weights, path / "model.safetensors")
