"""How a decode step is run: by plain calls, by compiled blocks, or as one captured CUDA graph. All give the same
tokens in fp32; in 16 bits a near tie may fall the other way.

A frozen cache has static shapes and is written in place, so the fast runners need no help from the model: a compiled
block replaces the call of a block, and a graph replays the whole step.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor

from nanokv.cache.decode import KVCache
from nanokv.compiled import Compiled, CompileOptions, no_cpp_compiling
from nanokv.model.llama import Llama

RUNNERS = ("eager", "compile", "graph")


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


class Graphed:
    """One CUDA graph of the whole step, captured at the second step after each change of the cache or its memory.

    The first step, which is run for real, is the warm-up: throw-away steps would cost an evicting policy real slots.
    `inner` runs the step that is captured: by plain calls, or by compiled blocks, which are compiled in the first
    step. `if_possible`: a step that waits for the host is run by `inner`, instead of a ValueError.
    """

    def __init__(self, inner: Runner, if_possible: bool = False):
        self.inner, self.if_possible = inner, if_possible
        self.capture_s, self.layout, self.graph = 0.0, None, None

    @property
    def name(self) -> str:
        return "graph" if self.inner.name == "eager" else self.inner.name

    @property
    def compile_s(self) -> float:
        return self.inner.compile_s + self.capture_s

    def step(self, tokens: Tensor, pos: Tensor, cache: KVCache) -> Tensor:
        if self.if_possible and cache.needs_host_sync:
            return self.inner.step(tokens, pos, cache)
        cache.freeze()
        if self.layout is not cache.layout:
            self.layout, self.graph = cache.layout, None
            self.tokens, self.pos = tokens.clone(), pos.clone()  # the captured step is given these, too
            return self.inner.step(self.tokens, self.pos, cache)
        if self.graph is None:
            t0, graph = time.perf_counter(), torch.cuda.CUDAGraph()
            self.tokens.copy_(tokens)
            self.pos.copy_(pos)
            # captures; nothing runs, so no state needs restoring
            with torch.cuda.device(tokens.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(tokens.device)):
                self.logits = self.inner.step(self.tokens, self.pos, cache)
            self.graph = graph
            self.capture_s += time.perf_counter() - t0
        self.tokens.copy_(tokens)
        self.pos.copy_(pos)
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them


def make(name: str, model: Llama, how: CompileOptions | None = None) -> Runner:
    """auto: plain calls, which start at once; on a CUDA device one graph of the step where that is possible. compile: on
    a CUDA device the compiled blocks are captured in one graph. ValueError if the device or the compiler is missing.
    """
    device, how = model.embed_tokens.weight.device.type, how or CompileOptions()
    on_cuda = device == "cuda"
    if name == "auto" and how == CompileOptions() and on_cuda:
        return Graphed(Eager(model), if_possible=True)
    name = "eager" if name == "auto" else name
    if how != CompileOptions() and name != "compile":
        raise ValueError(f"compile options are for --runner compile, and the runner is {name}; give one of them")
    if name == "graph" and not on_cuda:
        raise ValueError(
            "runner graph captures CUDA graphs and the device is no CUDA device; use --runner compile or eager"
        )
    makes_cpp = how.backend == "inductor" and device == "cpu"
    if name == "compile" and makes_cpp and (reason := no_cpp_compiling()):
        raise ValueError(f"runner compile {reason}; use --runner eager")
    if name == "graph":
        return Graphed(Eager(model))
    if name == "eager":
        return Eager(model)
    # these modes capture graphs of their own, one per block
    captures_itself = how.mode in ("reduce-overhead", "max-autotune")
    return Graphed(Compiled(model, how)) if on_cuda and not captures_itself else Compiled(model, how)
