"""The shapes of the tiny checkpoints, and what they need beside weights. Imports nothing of nanokv."""

from __future__ import annotations

from pathlib import Path

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
    "mistral-v2": ("Mistral", {"sliding_window": None}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "head-dim": ("Llama", {"head_dim": 32}),
    "bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "deep": ("Llama", {"num_hidden_layers": 8, "initializer_range": 0.1}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
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
