"""The search for layers that can share a cache, its calibration texts, and the file of its result.

It knows the model and a tokenizer, no policy and no store.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nanokv.backends.base import Ops
from nanokv.cache.whole import WholeCache
from nanokv.files import quoted, read_json, reason, replacing
from nanokv.model.config import ModelConfig
from nanokv.model.llama import Llama
from nanokv.sharing.base import Sharing
from nanokv.text.tokenizer import Tokenizer

TEXTS, TOKENS = 30, 64  # as in the paper: 30 texts of 64 tokens


@dataclass(frozen=True)
class Pair:
    """`reader` reads what `owner` holds. distance: between their mean keys and values. similarity: of the model's output
    with and without this pair; NaN until it is tried.
    """

    reader: int
    owner: int
    distance: float
    similarity: float = float("nan")

    def __str__(self) -> str:
        return f"layers {self.reader} and {self.owner}: distance {self.distance:.3f}, output's cosine {self.similarity:.4f}"


@torch.inference_mode()
def search(
    model: Llama,
    ops: Ops,
    texts: Tensor,
    layers: int,
    threshold: float,
    order: str,
    tried: Callable[[Pair, bool], None] = lambda *_: None,
) -> tuple[dict[int, int], list[Pair]]:
    """texts (n,T) token ids → the map reader → owner, and the accepted pairs. tried(pair, accepted) is called for
    every pair.

    Fewer layers than wanted share if the pairs run out. The later layer of a pair is always the reader, so layer 0
    owns its cache.
    """
    n = model.config.num_hidden_layers
    pos = torch.arange(texts.shape[1], device=texts.device).expand(texts.shape)

    def run(share: Mapping[int, int]) -> tuple[Tensor, WholeCache]:
        cache = WholeCache(share, ops, model.config)
        return model.hidden(texts, pos, cache).float().flatten(1), cache  # (n,T·C) after the last norm

    reference, cache = run({})
    share: dict[int, int] = {}
    accepted: list[Pair] = []
    for pair in ranked_pairs(cache, n, order):
        if len(accepted) == layers:
            break
        if pair.reader in share:
            continue
        trial = with_pair(share, pair)
        similarity = cosine_similarity(reference, run(trial)[0]).mean().item()
        pair = Pair(pair.reader, pair.owner, pair.distance, similarity)
        good = similarity > threshold
        tried(pair, good)
        if good:
            share = trial
            accepted.append(pair)
    return share, accepted


def ranked_pairs(cache: WholeCache, n: int, order: str) -> list[Pair]:
    """All pairs of layers with one sliding window, by the L2 distance of keys and of values, averaged over texts position
    by position, then over heads and positions.
    """
    window = cache.config.window
    k, v = ([x[i].float().mean(0) for i in range(n)] for x in (cache.k, cache.v))  # (Hkv,T,D) each
    pairs = [
        Pair(i, j, sum((x[i] - x[j]).norm(dim=-1).mean().item() for x in (k, v)) / 2)
        for i in range(n)
        for j in range(i)
        if window(i) == window(j)
    ]
    if order == "random":
        random.Random(0).shuffle(pairs)
        return pairs
    return sorted(pairs, key=lambda p: -p.distance if order == "dissimilar" else p.distance)


def with_pair(share: Mapping[int, int], pair: Pair) -> dict[int, int]:
    """The map with one more pair. Layers that read the new reader, and the new reader itself, now read the pair's
    final owner.
    """
    owner = share.get(pair.owner, pair.owner)
    return {i: owner if o == pair.reader else o for i, o in share.items()} | {pair.reader: owner}


def calibration(tokenizer: Tokenizer, n: int = TEXTS, length: int = TOKENS) -> Tensor:
    """(n,length) token ids: the beginnings of as many paragraphs of the documentation that every CPython carries."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n") if p[:1].isalpha()]
    long = [ids[:length] for p in paragraphs if len(p) > 2 * length and len(ids := tokenizer.encode(p)) >= length]
    if len(long) < n:
        raise ValueError(
            f"only {len(long)} of {n} calibration texts have {length} tokens; give a map with kvsharer:map=FILE"
        )
    return torch.tensor([long[i * len(long) // n] for i in range(n)])


def write_map(
    file: Path, model: str, fingerprint: str, want: Sharing, share: Mapping[int, int], pairs: Sequence[Pair]
) -> None:
    """Write the map as JSON, first beside the file and then renamed."""
    facts = {
        "model": model,
        "fingerprint": fingerprint,
        **asdict(want),
        "map": {str(i): o for i, o in sorted(share.items())},
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_text(json.dumps({**facts, "pairs": [asdict(p) for p in pairs]}, indent=1) + "\n")
    except OSError as e:
        raise ValueError(f"{file} cannot be written ({e.strerror}); give a file of yours") from None


def read_map(file: Path, fingerprint: str, config: ModelConfig) -> dict[int, int]:
    """The map of shared layers in `file`. ValueError if it is incomplete, of another model, or no map of its layers."""
    try:
        facts = read_json(file)
        share, is_this_model = facts["map"], facts["fingerprint"] == fingerprint
    except (ValueError, KeyError) as e:
        raise ValueError(
            f"{file} is no map of shared layers ({reason(e)}); python -m nanokv.sharing search makes one"
        ) from None
    if not is_this_model:
        raise ValueError(
            f"{file} is the map of another model ({quoted(facts.get('model'))}); search again, or give the model it was made for"
        )
    return checked_map(share, config, str(file))


def checked_map(share: Any, config: ModelConfig, where: str) -> dict[int, int]:
    """The map that a JSON object describes: reader layer → owner layer. ValueError if it has a reader without an owner, or
    joins layers of different sliding windows.
    """
    pairs = list(share.items()) if isinstance(share, dict) else [("", None)]
    if not all(
        i.isascii() and i.isdigit() and len(i) < 7 and isinstance(o, int) and not isinstance(o, bool) for i, o in pairs
    ):
        raise ValueError(
            f"{where} has the map {quoted(share)}; it must lead from numbers of layers to numbers of layers"
        )
    found = {int(i): o for i, o in pairs}
    if len(found) < len(pairs) or not all(
        0 <= o < i < config.num_hidden_layers and o not in found for i, o in found.items()
    ):
        raise ValueError(f"{where} is no map of this model: each reader needs an earlier layer that owns its cache")
    if differ := [f"{i} and {o}" for i, o in found.items() if config.window(i) != config.window(o)]:
        raise ValueError(f"{where} joins layers {differ[0]}, which have different sliding windows; search again")
    return found


def map_file(weights: Path, fingerprint: str, want: Sharing) -> Path:
    """The file in which the map of a model's search is kept."""
    return (
        weights / "maps" / f"{fingerprint}-{'-'.join(str(x) for name, x in asdict(want).items() if name != 'map')}.json"
    )
