"""What rounding the keys or the values of a single layer costs a model, measured once and kept in a file beside the
weights. For stores whose bits differ by layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.files import quoted, read_json, reason, replacing
from nanokv.model.config import ModelConfig
from nanokv.model.llama import Llama
from nanokv.stores.quant.tuned import Tuned
from nanokv.text.tokenizer import Tokenizer

TEXTS, TOKENS, EVERY = (
    2,
    256,
    4,
)  # texts, their length, and at which of their tokens the model's predictions are compared
Costs = dict[str, list[float]]


class RoundedCache:
    """A cache for one forward pass of texts of equal length, in which one part of one layer is rounded."""

    def __init__(self, store: Tuned, ops: Ops, config: ModelConfig, target: tuple[int, str] | None):
        """target: layer and part ("k" or "v"); None: nothing is rounded."""
        self.store, self.ops, self.config, self.target = store, ops, config, target
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # layer → K and V (B,Hkv,T,D)
        shared = config.shared_layers
        self.layers = [RoundedLayer(self, i, shared.get(i, i)) for i in range(config.num_hidden_layers)]


class RoundedLayer:
    def __init__(self, cache: RoundedCache, index: int, owner: int):
        self.cache, self.owner, self.owns = cache, owner, owner == index

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        c = self.cache
        if self.owns:
            is_target = c.target is not None and c.target[0] == self.owner
            c.held[self.owner] = c.store.rounded(c.ops, k, v, c.target[1]) if is_target else (k, v)
        return c.ops.prefill(q, *c.held[self.owner], 0, c.config.window(self.owner))


@torch.inference_mode()
def measure(model: Llama, ops: Ops, store: Tuned, texts: Tensor, progress: Callable[[], object]) -> Costs:
    """texts (n,T) token ids → "k" and "v" → per layer the mean divergence (KL, nats) of the next-token distribution.
    progress() is called after each of the forward passes, of which there are two per layer and one more.
    """
    pos = torch.arange(texts.shape[1], device=texts.device).expand(texts.shape)

    def predictions(target: tuple[int, str] | None) -> Tensor:
        hidden = model.hidden(texts, pos, RoundedCache(store, ops, model.config, target))
        progress()
        return model.logits(hidden[:, ::EVERY].flatten(0, 1)).float().log_softmax(-1)

    right, n = predictions(None), model.config.num_hidden_layers

    def cost(layer: int, part: str) -> float:
        if layer in model.config.shared_layers:
            return 0.0  # it reads another layer's
        found = predictions((layer, part))
        return float((right.exp() * (right - found)).sum(-1).mean().clamp(min=0))

    return {part: [cost(i, part) for i in range(n)] for part in "kv"}


def passages(tokenizer: Tokenizer, n: int = TEXTS, length: int = TOKENS) -> Tensor:
    """(n,length) token ids of the documentation that every CPython carries."""
    from pydoc_data.topics import topics

    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))[: 40 * n * length])
    if len(ids) < n * length:
        raise ValueError(
            f"the texts to measure with have only {len(ids)} of {n * length} tokens; give the bits as in tuned:layers=k8v4x2-k4v2"
        )
    return torch.tensor(ids[: n * length]).view(n, length)


def file_of(weights: Path, fingerprint: str, store: Tuned) -> Path:
    """The file in which a model's costs are kept."""
    return weights / "maps" / f"{fingerprint}-bits-{store.group}.json"


def write(file: Path, model: str, fingerprint: str, costs: Costs) -> None:
    facts: dict[str, Any] = {"model": model, "fingerprint": fingerprint, "costs": costs}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as e:
        raise ValueError(f"{file} cannot be written ({e.strerror}); set NANOKV_WEIGHTS to a folder of yours") from None


def read(file: Path, fingerprint: str, config: ModelConfig) -> Costs:
    """ValueError if the file is incomplete or of another model."""
    try:
        facts = read_json(file)
        costs, is_this_model = facts["costs"], facts["fingerprint"] == fingerprint
        found = {part: costs[part] for part in "kv"}
        complete = all(
            isinstance(x, list)
            and len(x) == config.num_hidden_layers
            and all(isinstance(y, float | int) and 0 <= y < float("inf") for y in x)
            for x in found.values()
        )
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{file} does not hold what rounding costs ({reason(e)}); delete it to measure again"
        ) from None
    if not is_this_model:
        raise ValueError(f"{file} is of another model ({quoted(facts.get('model'))}); delete it to measure again")
    if not complete:
        raise ValueError(f"{file} lacks the costs of some layers; delete it to measure again")
    return found
