"""Tiny models whose weights transformers made up, and the real default model, each loaded once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: a spinning thread on a busy machine slows tests tenfold

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported anywhere
torch.set_num_threads(1)  # tiny tensors: a second thread only waits

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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name → (directory with the checkpoint and a byte tokenizer, the transformers model), made once."""
    import transformers

    transformers.logging.set_verbosity_error()
    made = {}

    def make(name: str):
        if name not in made:
            kind, extra = VARIANTS[name]
            config = getattr(transformers, f"{kind}Config")(**{**TINY, **extra}, attn_implementation="eager")
            torch.manual_seed(len(name))
            oracle = getattr(transformers, f"{kind}ForCausalLM")(config).eval().float()
            with torch.no_grad():
                for key, value in oracle.named_parameters():
                    if key.endswith("bias"):
                        value.normal_(0, 0.5)  # transformers starts them at zero, which would hide a missing one
            path = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(path)
            write_tokenizer(path)
            made[name] = path, oracle
        return made[name]

    return make


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer.json of 96 tokens: every printable ASCII character is one, and the newline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {chr(i): i - 32 for i in range(33, 127)} | {"Ġ": 0, "Ċ": 95}
    tok = Tokenizer(models.BPE(vocab, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="session")
def llm_of(tiny):
    """name → the tiny model in fp32, as nanokv loads it."""
    from nanokv import load

    made = {}

    def make(name: str):
        if name not in made:
            made[name] = load(str(tiny(name)[0]), dtype="float32")
        return made[name]

    return make


@pytest.fixture(scope="session")
def smollm():
    """The default model in fp32, fetched if it is not here."""
    from nanokv import load

    torch.set_num_threads(2)
    yield load("smollm2-135m", dtype="float32")
    torch.set_num_threads(1)


def text(n: int, seed: int = 0, vocab: int = 96) -> list[int]:
    """n random token ids."""
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
