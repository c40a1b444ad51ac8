"""A token's way through the code, printed: `python -m docs.trace snapkv` or `python -m docs.trace simlayer`.

A model of two layers with random weights reads twelve tokens, then one, then a turn of three. While it runs, some
functions are wrapped: each call prints where the function stands, the shapes that it saw, and the numbers that decide.
docs/reading.md explains the output, and a test compares what stands there with what this script prints.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nanokv import parse
from nanokv.backends import EAGER
from nanokv.cache import decode
from nanokv.cache.decode import KVCache
from nanokv.cache.kept import Kept
from nanokv.cache.prefill import PromptLayer
from nanokv.cache.slots import Slots
from nanokv.engine import Models, Session
from nanokv.model import loader
from nanokv.model.config import ModelConfig
from nanokv.model.llama import Attention
from nanokv.policies.simlayer import SimLayerKV
from nanokv.policies.snapkv import SnapKV
from nanokv.runner import Eager
from nanokv.stores.dense import SlotStore

ROOT = Path(__file__).parent.parent
WORDS = ["The", "code", "for", "Riga", "is", "7", "3", "1", ".", "What", "is", "it"]
PLANS = {
    "snapkv": "snapkv:budget=6,window=2,kernel=3",
    "simlayer": "simlayer:threshold=0.42,sink=1,recent=4,window=2",
}
CONFIG = ModelConfig(
    vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


class Trace:
    """Prints the calls of the functions that it watches."""

    def __init__(self, out: Callable[[str], None]):
        self.out, self.number, self.calls = out, 0, Counter()

    def station(self, function: Callable, lines: list[str]) -> None:
        self.number += 1
        file = Path(inspect.getsourcefile(function)).relative_to(ROOT).as_posix()
        self.out(f"{self.number:2}  {function.__qualname__}  {file}")
        for line in lines:
            self.out(f"      {line}")

    def wrapped(self, function: Callable, say: Callable[..., list[str]], calls: int, before: bool = False) -> Callable:
        """The function, whose first calls print say(result, *arguments), or say(None, *arguments) before they run."""

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            self.calls[say] += 1
            shown = self.calls[say] <= calls
            if shown and before:
                self.station(function, say(None, *args, **named))
            result = function(*args, **named)
            if shown and not before:
                self.station(function, say(result, *args, **named))
            return result

        return call

    @contextmanager
    def watching(self, *watched: tuple) -> Iterator[None]:
        """Print the calls of these (owner, name of the function, say, number of calls)."""
        with ExitStack() as stack:
            for owner, name, say, *more in watched:
                function = getattr(owner, name)
                call = self.wrapped(function, say, *more)
                stack.enter_context(
                    patch.object(owner, name, staticmethod(call) if inspect.ismethod(function) else call)
                )
            yield


# ---- what each station says; the first argument is what the function returned ----------------------------------------


def block(_, attention: Attention, x: Tensor, *more: Any) -> list[str]:
    return [f"x {shape(x)}, after the first norm"]


def attend(_, layer: PromptLayer, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> list[str]:
    return [f"layer {layer.index}: q {shape(q)}, k and v {shape(k)}, positions 0 … {int(pos[0, -1])}"]


def scores(found: Tensor, q: Tensor, k: Tensor, start: int, *more: Any) -> list[str]:
    last = start + q.shape[2] - 1
    return [
        f"q {shape(q)} of the tokens {start} … {last}, k {shape(k)} → attention scores {shape(found)}",
        *heads(found),
    ]


def pooled(found: Tensor, policy: SnapKV, prompt: Any) -> list[str]:
    return [
        f"maximum over a token and {policy.kernel // 2} neighbour on each side; inf: the observation window",
        *heads(found),
    ]


def top(kept: Kept, *more: Any, **named: Any) -> list[str]:
    return [f"k and v {shape(kept.k)}; positions of the tokens that stay", *heads(kept.pos)]


def laziness(kept: Kept, policy: SimLayerKV, p: Any) -> list[str]:
    lazy = "lazy" if kept.layer_score > policy.threshold else "not lazy"
    score = f"layer {p.layer}: laziness {kept.layer_score:.2f}, threshold {policy.threshold}: {lazy}"
    return [score, f"k and v {shape(kept.k)} of {shape(p.k)}; positions of the tokens that stay", *heads(kept.pos)[:1]]


def slots(_, s: Slots, *more: Any) -> list[str]:
    return [
        f"{s.capacity} slots per head, {s.length[0].tolist()} of them valid; the position in each slot (-1: empty)",
        *heads(s.pos),
    ]


def packed(cache: KVCache, *more: Any) -> list[str]:
    return [f"{len(cache.stores)} stores, room for {cache.room} more tokens in heads that grow"]


def record(_, s: Slots, slot: int, pos: Tensor) -> list[str]:
    return [f"position {int(pos[0, 0])} goes to slot {slot}", *heads(s.pos)[:1]]


def read(found: tuple, store: SlotStore, q: Tensor, *more: Any) -> list[str]:
    return [f"q {shape(q)} over {store.slots.max_used} slots → out {shape(found[0])}, lse {shape(found[1])}"]


def merged(found: tuple, parts: list) -> list[str]:
    return [f"{len(parts)} parts, weighted by their lse: the stored tokens; the turn's own → out {shape(found[0])}"]


def extended(_, store: SlotStore, k: Tensor, *more: Any) -> list[str]:
    return [f"k and v {shape(k)} are stored now", *heads(store.slots.pos)[:1]]


def shape(x: Tensor) -> str:
    return "(" + ",".join(map(str, x.shape)) + ")"


def heads(x: Tensor) -> list[str]:
    """One line per KV head of a tensor (1,Hkv,N)."""
    form = "{:5.2f}" if x.is_floating_point() else "{:3d}"
    return [f"KV head {h}: " + " ".join(form.format(n) for n in row) for h, row in enumerate(x[0].tolist())]


# ---- the run ----------------------------------------------------------------------------------------------------------


def models(trace: Trace, layers: int = 1) -> Models:
    """A model with random weights that computes with the plain functions of kernels/reference.py. layers: how many of them
    print their scores.
    """
    generator, cpu = torch.Generator().manual_seed(7), torch.device("cpu")
    model = loader.empty(CONFIG, EAGER, cpu, torch.float32)
    for name, weight in model.named_parameters():
        weight.data.fill_(1) if "norm" in name else weight.data.normal_(0, 0.5, generator=generator)
    ops = replace(EAGER, attention_scores=trace.wrapped(EAGER.attention_scores, scores, layers))
    return Models(model, model, ops, Eager(model))


def run(name: str, out: Callable[[str], None] = print) -> None:
    """Run one plan and print its stations."""
    plan, trace = parse(PLANS[name]), Trace(out)
    layers = 2 if name == "simlayer" else 1
    session = Session(models(trace, layers), plan, room=8)
    out(f"== {PLANS[name]} reads the prompt: {' '.join(WORDS)}")
    choice = (
        [(SimLayerKV, "keep", laziness, 2)]
        if name == "simlayer"
        else [(SnapKV, "score", pooled, 1), (Kept, "top", top, 1)]
    )
    first = [(Attention, "forward", block, 1, True), (PromptLayer, "attend", attend, 1, True)]
    with trace.watching(*first, *choice, (Slots, "__init__", slots, layers), (KVCache, "pack", packed, 1)):
        logits = session.start([range(len(WORDS))])
    receipt(session, out)
    out("\n== one decode step: the token at position 12")
    with trace.watching((Slots, "record_at", record, layers), (SlotStore, "read", read, 1)):
        session.feed(logits.argmax(-1, keepdim=True))
    receipt(session, out)
    out("\n== a turn of three tokens at once, positions 13 … 15")
    trace.calls.clear()
    with trace.watching(
        (SlotStore, "read", read, 1), (decode, "merge", merged, 1), (SlotStore, "extend", extended, layers)
    ):
        session.feed(torch.tensor([[1, 2, 3]]))
    receipt(session, out)


def receipt(session: Session, out: Callable[[str], None]) -> None:
    report = session.report()
    held = " and ".join(str(x.kept[0]) for x in report.layers)
    out(
        f"receipt: the layers' KV heads hold {held} of {report.seen[0]} tokens; {report.bytes} bytes, {report.used_bytes} in use"
    )


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] not in PLANS:
        print(f"usage: python -m docs.trace {{{','.join(PLANS)}}}", file=sys.stderr)
        return 2
    run(argv[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
