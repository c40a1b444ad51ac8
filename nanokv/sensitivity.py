"""How much rounding the keys or the values of a single layer changes what a model predicts: measured once, and kept in a
file beside the weights. For the store whose bits differ by layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.cache.whole import WholeCache
from nanokv.files import quoted, read_json, replacing
from nanokv.model.config import ModelConfig
from nanokv.model.llama import Llama
from nanokv.stores.quant.tuned import Tuned
from nanokv.text.tokenizer import Tokenizer

TEXTS, TOKENS = 2, 256  # texts, and tokens of each
EVERY = 4  # the model's predictions are compared at every fourth token
Sensitivity = dict[str, list[float]]


@torch.inference_mode()
def measure(model: Llama, ops: Ops, store: Tuned, texts: Tensor, progress: Callable[[], object]) -> Sensitivity:
    """texts (n,T) token ids → "k" and "v" → per layer the mean divergence (KL, nats) of the next-token distribution.
    progress() is called after each of the forward passes, of which there are two per layer and one more.
    """
    pos = torch.arange(texts.shape[1], device=texts.device).expand(texts.shape)

    def predictions(target: tuple[int, str] | None) -> Tensor:
        def change(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return store.rounded(ops, k, v, target[1]) if target and target[0] == layer else (k, v)

        hidden = model.hidden(texts, pos, WholeCache(model.config.shared_layers, ops, model.config, change))
        progress()
        return model.logits(hidden[:, ::EVERY].flatten(0, 1)).float().log_softmax(-1)

    right, n = predictions(None), model.config.num_hidden_layers

    def divergence(layer: int, part: str) -> float:
        if layer in model.config.shared_layers:
            return 0.0  # it reads another layer's
        found = predictions((layer, part))
        return float((right.exp() * (right - found)).sum(-1).mean().clamp(min=0))

    return {part: [divergence(i, part) for i in range(n)] for part in "kv"}


def passages(tokenizer: Tokenizer, group: int, n: int = TEXTS, tokens: int = TOKENS) -> Tensor:
    """(n,length) token ids of the documentation that every CPython carries: at least so many tokens each, in whole groups."""
    from pydoc_data.topics import topics

    length = -(-tokens // group) * group
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))[: 40 * n * length])
    if len(ids) < n * length:
        raise ValueError(
            f"the texts to measure with have only {len(ids)} of {n * length} tokens; give the bits as in tuned:layers=k8v4x2-k4v2"
        )
    return torch.tensor(ids[: n * length]).view(n, length)


def file_of(weights: Path, fingerprint: str, store: Tuned) -> Path:
    """The file in which a model's sensitivity is kept."""
    return weights / "maps" / f"{fingerprint}-bits-{store.group}.json"


def check_writable(file: Path) -> None:
    """ValueError if the file cannot be written: a measurement takes a minute, so this is asked before."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() or not os.access(file.parent, os.W_OK):
            raise OSError(0, "it is a folder" if file.exists() else "its folder is read-only")
    except OSError as e:
        raise ValueError(
            f"{file}, which keeps the sensitivity of the layers, cannot be written ({e.strerror}); "
            "make its folder writable, or give the bits as in tuned:layers=k8v4x2-k4v2"
        ) from None


def write(file: Path, model: str, fingerprint: str, found: Sensitivity) -> None:
    facts: dict[str, Any] = {"model": model, "fingerprint": fingerprint, "sensitivity": found}
    with replacing(file) as part:
        part.write_text(json.dumps(facts, indent=1) + "\n")


def read(file: Path, fingerprint: str, config: ModelConfig) -> Sensitivity:
    """ValueError if the file is damaged, or of another model."""
    try:
        facts = read_json(file)
    except ValueError:
        raise ValueError(f"{file} cannot be read as JSON; delete it to measure again") from None
    if facts.get("fingerprint") != fingerprint:
        raise ValueError(f"{file} is of another model ({quoted(facts.get('model'))}); delete it to measure again")
    found = facts.get("sensitivity")
    n = config.num_hidden_layers
    right = isinstance(found, dict) and all(
        isinstance(found.get(part), list)
        and len(found[part]) == n
        and all(isinstance(x, float) and 0 <= x < float("inf") for x in found[part])
        for part in "kv"
    )
    if not right:
        raise ValueError(f"{file} does not hold a sensitivity for each of {n} layers; delete it to measure again")
    return {part: found[part] for part in "kv"}
