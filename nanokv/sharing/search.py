"""The share axis: which layers own no cache and read an earlier one's, found once for a model by KVSharer's search.

`python -m nanokv.share search --model M --layers 8` shows the search and writes the map; a plan with `kvsharer` finds it or makes it.
Knows the model and a tokenizer; no policy, no store.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nanokv.backends.base import Ops
from nanokv.model.llama import Llama
from nanokv.sharing.kvsharer import KVSharer
from nanokv.text.tokenizer import Tokenizer

TEXTS, TOKENS = 30, 64  # as many of as many tokens as in the paper


@dataclass(frozen=True)
class Pair:
    """`reader` reads what `owner` holds. distance of their mean keys and values; similarity of the model's output, once tried."""

    reader: int
    owner: int
    distance: float
    similarity: float = float("nan")

    def __str__(self) -> str:
        return f"layers {self.reader} and {self.owner}: distance {self.distance:.3f}, output's cosine {self.similarity:.4f}"


class Texts:
    """A cache for one forward pass of texts of equal length, under a share map: what a search needs of one."""

    def __init__(self, n_layers: int, share: Mapping[int, int], ops: Ops, sliding_window: int | None):
        self.k: dict[int, Tensor] = {}  # owner → (B,Hkv,T,D)
        self.v: dict[int, Tensor] = {}
        self.ops, self.sliding_window = ops, sliding_window
        self.layers = [TextLayer(self, i, share.get(i, i)) for i in range(n_layers)]


class TextLayer:
    def __init__(self, cache: Texts, index: int, owner: int):
        self.cache, self.owner, self.owns = cache, owner, owner == index

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        c = self.cache
        if self.owns:
            c.k[self.owner], c.v[self.owner] = k, v
        return c.ops.prefill(q, c.k[self.owner], c.v[self.owner], 0, c.sliding_window)


@torch.inference_mode()
def search(
    model: Llama, ops: Ops, texts: Tensor, want: KVSharer, tick: Callable[[Pair, bool], None] = lambda *_: None
) -> tuple[dict[int, int], list[Pair]]:
    """texts (n,T) token ids → the map reader → owner, and the accepted pairs. tick(pair, accepted) is told of every one tried.

    Fewer layers than wanted are shared if the pairs run out. The later layer of a pair is always the reader, so layer 0 owns.
    """
    n = model.config.num_hidden_layers
    pos = torch.arange(texts.shape[1], device=texts.device).expand(texts.shape)

    def run(share: Mapping[int, int]) -> tuple[Tensor, Texts]:
        cache = Texts(n, share, ops, model.config.sliding_window)
        return model.hidden(texts, pos, cache).float().flatten(1), cache  # (n,T·C) after the last norm

    right, cache = run({})
    share: dict[int, int] = {}
    accepted: list[Pair] = []
    for pair in ranked(cache, n, want.order):
        if len(accepted) == want.layers:
            break
        if pair.reader in share:
            continue
        trial = joined(share, pair)
        similarity = cosine_similarity(right, run(trial)[0]).mean().item()
        pair = Pair(pair.reader, pair.owner, pair.distance, similarity)
        good = similarity > want.threshold
        tick(pair, good)
        if good:
            share = trial
            accepted.append(pair)
    return share, accepted


def ranked(cache: Texts, n: int, order: str) -> list[Pair]:
    """All pairs by the L2 distance of keys and of values, averaged over texts position by position, then over heads and positions."""
    k, v = ([x[i].float().mean(0) for i in range(n)] for x in (cache.k, cache.v))  # (Hkv,T,D) each
    pairs = [
        Pair(i, j, sum((x[i] - x[j]).norm(dim=-1).mean().item() for x in (k, v)) / 2)
        for i in range(n)
        for j in range(i)
    ]
    if order == "random":
        random.Random(0).shuffle(pairs)
        return pairs
    return sorted(pairs, key=lambda p: -p.distance if order == "dissimilar" else p.distance)


def joined(share: Mapping[int, int], pair: Pair) -> dict[int, int]:
    """The map with one more pair. Who read the new reader, and the new reader itself, read whoever owns in the end."""
    owner = share.get(pair.owner, pair.owner)
    return {i: owner if o == pair.reader else o for i, o in share.items()} | {pair.reader: owner}


def calibration(words: Tokenizer, n: int = TEXTS, length: int = TOKENS) -> Tensor:
    """(n,length) token ids: the beginnings of as many paragraphs of the documentation that every CPython carries."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n") if p[:1].isalpha()]
    long = [ids[:length] for p in paragraphs if len(p) > 2 * length and len(ids := words.encode(p)) >= length]
    if len(long) < n:
        raise ValueError(
            f"only {len(long)} of {n} calibration texts have {length} tokens; give a map with kvsharer:map=FILE"
        )
    return torch.tensor([long[i * len(long) // n] for i in range(n)])


def write(
    file: Path, model: str, fingerprint: str, want: KVSharer, share: Mapping[int, int], pairs: Sequence[Pair]
) -> None:
    """The map as JSON, beside and then renamed."""
    facts = {
        "model": model,
        "fingerprint": fingerprint,
        **asdict(want),
        "map": {str(i): o for i, o in sorted(share.items())},
    }
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**facts, "pairs": [asdict(p) for p in pairs]}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as e:
        raise ValueError(f"{file} cannot be written ({e.strerror}); give a file of yours") from None


def stored(file: Path, fingerprint: str, n_layers: int) -> dict[int, int]:
    """A map for this model. ValueError if it is none: not whole, of another model, or not closed."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        share = {int(i): int(o) for i, o in facts["map"].items()}
        right = facts["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{file} is no map of shared layers ({str(e) or 'empty'}); python -m nanokv.share search makes one"
        ) from None
    if not right:
        raise ValueError(
            f"{file} is the map of another model ({facts.get('model')}); search anew, or give the model it was made for"
        )
    if not all(0 <= o < i < n_layers and o not in share for i, o in share.items()):
        raise ValueError(f"{file} is no map of this model: each reader needs an earlier layer that owns its cache")
    return share


def place(weights: Path, fingerprint: str, want: KVSharer) -> Path:
    """Where the map of a model's search lies."""
    return weights / "maps" / f"{fingerprint}-{want.layers}-{want.threshold}-{want.order}.json"


def main(argv: Sequence[str]) -> int:
    from nanokv.llm import load
    from weights.registry import DEFAULT, settings

    p = argparse.ArgumentParser(
        prog="nanokv.share", description="Find the layers that can share their cache (KVSharer)."
    )
    p.add_argument("what", choices=("search",))
    p.add_argument("--model", default=DEFAULT, metavar="M")
    p.add_argument("--layers", type=int, default=KVSharer.layers, metavar="N", help="how many own no cache")
    p.add_argument(
        "--threshold", type=float, default=KVSharer.threshold, metavar="C", help="least cosine of the output"
    )
    p.add_argument("--order", default=KVSharer.order, metavar="O", help="dissimilar, or as controls similar or random")
    p.add_argument("--out", metavar="FILE", help="the map; by default where kvsharer:layers=N looks for it")
    p.add_argument("--device", default="auto", metavar="D")
    p.add_argument("--dtype", default="auto", metavar="T")
    p.error = lambda message: sys.exit(complain(message))
    args = p.parse_args(argv)
    try:
        if args.out and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
            raise ValueError(f"--out {args.out} cannot be written; give a file in a directory of yours")
        want = KVSharer(layers=args.layers, threshold=args.threshold, order=args.order)
        llm = load(args.model, device=args.device, dtype=args.dtype, bar=sys.stderr.isatty())
        file = Path(args.out) if args.out else place(settings().weights, llm.fingerprint(), want)
        share = llm.search(want, file, lambda line: print(line, flush=True))
    except ValueError as e:
        if settings().debug:
            raise
        return complain(str(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("in the end: " + ", ".join(f"{i} reads {o}" for i, o in sorted(share.items())))
    print(f"{len(share)} of {llm.config.num_hidden_layers} layers own no cache; wrote {file}")
    return 0


def complain(message: str) -> int:
    print(f"nanokv.share: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
