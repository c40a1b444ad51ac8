"""nanokv: a small inference engine for Llama and Mistral checkpoints whose heart is KV-cache compression."""

from importlib import import_module
from typing import Any

_HOMES = {"LLM": "llm", "load": "llm", "Plan": "cache.plan", "parse": "cache.plan", "Sampling": "text.sampler"}
__all__ = ["LLM", "Plan", "Sampling", "load", "parse"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that the command line answers --help without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nanokv' has no attribute {name!r}")
    return getattr(import_module(f"nanokv.{_HOMES[name]}"), name)
