"""Tiny models whose weights transformers made up, and the real default model, each loaded once."""

from __future__ import annotations

import os

# before torch: a spinning thread on a busy machine slows tests tenfold
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from tiny import TINY, VARIANTS, write_tokenizer

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported anywhere
torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, help="how many cases each fuzzer of tests/fuzz tries; by default few")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name → (directory with the checkpoint and a byte tokenizer, the transformers model), made once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # what generate.py prints is captured
    made = {}

    def make(name: str):
        if name not in made:
            kind, extra = VARIANTS[name]
            config = getattr(transformers, f"{kind}Config")(**{**TINY, **extra}, attn_implementation="eager")
            torch.manual_seed(len(name))
            oracle = getattr(transformers, f"{kind}ForCausalLM")(config).eval().float()
            with torch.no_grad():
                for key, value in oracle.named_parameters():
                    if key.endswith(("q_norm.weight", "k_norm.weight")):
                        value.uniform_(0.5, 1.5)  # and these at one
                    if key.endswith("bias"):
                        value.normal_(0, 0.5)  # transformers starts them at zero, which would hide a missing one
            path = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(path)
            write_tokenizer(path)
            made[name] = path, oracle
        return made[name]

    return make


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
