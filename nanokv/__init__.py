"""nanokv: a small inference engine for Llama and Mistral checkpoints whose heart is KV-cache compression."""

from nanokv.cache.plan import Plan, parse
from nanokv.llm import LLM, load
from nanokv.text.sampler import Sampling

__all__ = ["LLM", "Plan", "Sampling", "load", "parse"]
__version__ = "0.1.0"
