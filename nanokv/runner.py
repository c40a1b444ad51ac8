"""Who runs a decode step: plain calls, compiled blocks, or one captured CUDA graph. All give the same tokens.

A step is static shapes and in place (`cache.freeze`), so the two fast ones need no help from the model: a compiled block stands in
for a block's call, and a graph replays the step whole.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from shutil import which
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

from nanokv.cache.decode import KVCache
from nanokv.model.llama import Block, Llama

RUNNERS = ("eager", "compile", "graph")
COMPILERS = ("g++", "clang++")


class Runner(Protocol):
    name: str
    compile_s: float  # seconds spent on compiling or capturing so far

    def step(self, tokens: Tensor, pos: Tensor, cache: KVCache) -> Tensor:
        """tokens, pos (B,1) → logits (B,vocab)."""


class Eager:
    name, compile_s = "eager", 0.0

    def __init__(self, model: Llama):
        self.model = model

    def step(self, tokens: Tensor, pos: Tensor, cache: KVCache) -> Tensor:
        return self.model(tokens, pos, cache)


class Compiled:
    """torch.compile of a block and of what follows the last one: at most two graphs of each kind of block, whatever the lengths.

    Before each block torch checks that its graph still fits. Of what it would check, the weights and the program never change while
    this object lives, so only the cache's layer and the inputs are looked at (1 ms of 18 per step on 2 cores of an Emerald Rapids).
    """

    name = "compile"

    def __init__(self, model: Llama, backend: str | Callable = "inductor"):
        options = {"guard_filter_fn": lambda guards: [_varies(guard) for guard in guards]}
        if backend == "inductor" and model.embed_tokens.weight.device.type == "cpu":
            options |= {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
        self.model, self.compile_s = model, 0.0
        self.block, self.head = (
            torch.compile(_apart(f), backend=backend, fullgraph=True, options=dict(options))
            for f in (Block.forward, Llama.logits)
        )

    def step(self, tokens: Tensor, pos: Tensor, cache: KVCache) -> Tensor:
        cache.freeze()
        t0, before = time.perf_counter(), _graphs()
        with torch._dynamo.config.patch(recompile_limit=256):  # a process may see many plans
            out = self.head(self.model, self.model.hidden(tokens, pos, cache, self.block)[:, -1])
        if _graphs() > before:
            self.compile_s += time.perf_counter() - t0
        return out


def _varies(guard: Any) -> bool:
    """Of torch's guards: those on what a step is given."""
    return not guard.is_global and not guard.name.startswith(("self", "L['self']"))


def _apart(function: Callable) -> Callable:
    """The same function with code of its own: torch keeps graphs by code object, and what `_varies` leaves out differs between models."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


def _graphs() -> int:
    """Graphs that this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Graphed:
    """One CUDA graph around the whole step, recorded at a cache's second step.

    The usual throw-away steps before a recording would cost an evicting policy real slots: the first step, run for real, is the warm-up.
    """

    name = "graph"

    def __init__(self, model: Llama):
        self.model, self.compile_s, self.known, self.graph = model, 0.0, None, None

    def step(self, tokens: Tensor, pos: Tensor, cache: KVCache) -> Tensor:
        cache.freeze()
        if self.known is None or self.known[0]() is not cache or self.known[1] != cache.layout:
            self.known, self.graph = (weakref.ref(cache), cache.layout), None
            return self.model(tokens, pos, cache)
        if self.graph is None:
            t0, graph = time.perf_counter(), torch.cuda.CUDAGraph()
            self.tokens, self.pos = tokens.clone(), pos.clone()
            with torch.cuda.graph(graph):  # records; nothing runs, so no state needs restoring
                self.logits = self.model(self.tokens, self.pos, cache)
            self.graph = graph
            self.compile_s += time.perf_counter() - t0
        self.tokens.copy_(tokens)
        self.pos.copy_(pos)
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them


def make(name: str, model: Llama) -> Runner:
    """auto: plain calls, which start at once. ValueError where what it takes is missing."""
    name = "eager" if name == "auto" else name
    if name == "graph" and model.embed_tokens.weight.device.type != "cuda":
        raise ValueError(
            "runner graph captures CUDA graphs and the device is no CUDA device; use --runner compile or eager"
        )
    if name == "compile" and model.embed_tokens.weight.device.type == "cpu" and not any(map(which, COMPILERS)):
        raise ValueError(
            f"runner compile needs a C++ compiler and there is no {' or '.join(COMPILERS)}; use --runner eager"
        )
    return {"eager": Eager, "compile": Compiled, "graph": Graphed}[name](model)
