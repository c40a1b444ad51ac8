"""How a decode step is run: by plain calls, by compiled blocks, or as one captured CUDA graph. All give the same
tokens.

A frozen cache has static shapes and is written in place, so the fast runners need no help from the model: a compiled
block replaces the call of a block, and a graph replays the whole step.
"""

from __future__ import annotations

import difflib
import json
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from subprocess import SubprocessError
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

from nanokv.cache.decode import KVCache
from nanokv.model.llama import Block, Llama

RUNNERS = ("eager", "compile", "graph")
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
COMPILE_BACKENDS = ("inductor", "aot_eager", "eager")
COMPILERS = ("g++", "clang++")


@dataclass(frozen=True)
class CompileOptions:
    """How `Compiled` calls torch.compile. ValueError names what torch does not know.

    mode     one of MODES: a set of Inductor's options.
    backend  inductor, or for experiments a backend that generates no code: aot_eager (traces only) or eager (Dynamo only).
    dynamic  None: shapes are static at first, and those that change become dynamic. True or False: all, or none.
    options  Inductor's own options, which override those of the mode.
    """

    mode: str = "default"
    backend: str = "inductor"
    dynamic: bool | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        for name, value, allowed in (("mode", self.mode, MODES), ("backend", self.backend, COMPILE_BACKENDS)):
            if value not in allowed:
                raise ValueError(f"unknown compile {name} {value!r}; give one of {', '.join(allowed)}")
        if self.options and self.backend != "inductor":
            raise ValueError(
                f"compile options are Inductor's, and the backend is {self.backend}; leave one of them out"
            )
        known = _inductor().list_options() if self.options else []
        for key in self.options:
            if key not in known:
                close = difflib.get_close_matches(key, known, 3, 0.6)
                hint = f" (did you mean {' or '.join(close)}?)" if close else ""
                raise ValueError(f"torch's Inductor has no option {key!r}{hint}; see torch._inductor.config")

    @classmethod
    def parse(cls, mode: str, backend: str, dynamic: str, pairs: Sequence[str]) -> CompileOptions:
        """From texts: dynamic is auto, true or false; pairs are KEY=VALUE with a JSON value or plain text."""
        options = {}
        for pair in pairs:
            key, equals, text = pair.partition("=")
            if not equals or not key:
                raise ValueError(f"compile option {pair!r} is no KEY=VALUE pair; write it as in max_autotune=true")
            try:
                options[key] = json.loads(text)
            except ValueError:
                options[key] = text
        return cls(mode, backend, {"auto": None, "true": True, "false": False}[dynamic], options)


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
    """Compiles one block, and the head behind the last block, with torch.compile.

    A plan gets at most two graphs per kind of block, whatever the lengths. Layers are of one kind if they agree in
    what decides a step's operations: whether they store, and which parts their store has. Before each call torch
    checks its guards. The weights and the program never change while this object lives, so only guards on the cache's
    layer and the inputs are kept; that saves 1 ms of 18 per step on 2 cores of an Emerald Rapids.
    """

    name = "compile"

    def __init__(self, model: Llama, how: CompileOptions | None = None, backend: str | Callable | None = None):
        """backend: instead of the one in `how`, which names it; it may be a function, for tests."""
        how = how or CompileOptions()
        options = {"guard_filter_fn": lambda guards: [_keep_guard(guard) for guard in guards]}
        if (backend or how.backend) == "inductor":
            if model.embed_tokens.weight.device.type == "cpu":
                options |= {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
            # torch.compile takes a mode or options, not both, so the mode is written out
            options |= _inductor().list_mode_options(how.mode) | dict(how.options)
        given = {"backend": backend or how.backend, "fullgraph": True, "dynamic": how.dynamic}
        self.model, self.compile_s = model, 0.0
        self.block, self.head = (
            torch.compile(_own_code_object(f), options=dict(options), **given) for f in (Block.forward, Llama.logits)
        )

    def step(self, tokens: Tensor, pos: Tensor, cache: KVCache) -> Tensor:
        cache.freeze()
        t0, before = time.perf_counter(), _n_compiled()
        try:
            with (
                torch._dynamo.config.patch(recompile_limit=256),
                warnings.catch_warnings(),
            ):  # a process may see many plans
                warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")  # weights are fp16 where the cache is bf16
                out = self.head(self.model, self.model.hidden(tokens, pos, cache, self.block)[:, -1])
        except Exception as e:
            if not _is_of_compiling(e):
                raise
            raise ValueError(f"runner compile: torch.compile fails here ({_reason(e)}); use --runner eager") from e
        if _n_compiled() > before:
            self.compile_s += time.perf_counter() - t0
        return out


def _is_of_compiling(error: Exception) -> bool:
    """Whether torch.compile raised this while it compiled: by itself, or because a file or a program failed it."""
    from_torch = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return from_torch or isinstance(error, OSError | ImportError | SubprocessError)


def _reason(error: Exception) -> str:
    """The first line of the error, and of a compiler's own error."""
    lines = [x for x in str(error).splitlines() if not x.endswith("raised:")] or [type(error).__name__]
    at_fault = [line.strip() for line in lines[1:] if "error:" in line]
    return "; ".join([lines[0].strip(), *at_fault[:1]])


def _no_cpp_compiling() -> str:
    """Why Inductor could not compile C++ here: the end of a sentence; empty if nothing is known to stand in the way."""
    if not any(map(which, COMPILERS)):
        return f"needs a C++ compiler and there is no {' or '.join(COMPILERS)}"
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        folders = [str(Path(torch.__file__).parent), cache_dir()]
    except OSError as e:
        return f"cannot make the folder for what it compiles, {e.filename} ({e.strerror}): set TORCHINDUCTOR_CACHE_DIR"
    blank = next((folder for folder in folders if " " in folder), "")
    return f"would fail, because torch does not quote the blank in {blank!r} for the compiler" if blank else ""


def _inductor() -> Any:
    """torch's compiler, which takes a while to import."""
    import torch._inductor

    return torch._inductor


def _keep_guard(guard: Any) -> bool:
    """Whether this guard is on something that a step is given, which may change."""
    return not guard.is_global and not guard.name.startswith(("self", "L['self']"))


def _own_code_object(function: Callable) -> Callable:
    """A copy of the function with its own code object. torch keeps graphs by code object, and two models must not
    share theirs, because `_keep_guard` drops the guards that tell them apart.
    """
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


def _n_compiled() -> int:
    """How many graphs this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Graphed:
    """One CUDA graph of the whole step, captured at the second step after each change of the cache or its memory.

    The first step, which is run for real, is the warm-up: throw-away steps would cost an evicting policy real slots.
    `inner` runs the step that is captured: by plain calls, or by compiled blocks, which are compiled in the first
    step. `if_possible`: a step that waits for the host is run by `inner`, instead of a ValueError.
    """

    def __init__(self, inner: Runner, if_possible: bool = False):
        self.inner, self.if_possible = inner, if_possible
        self.capture_s, self.known, self.graph = 0.0, None, None

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
        if self.known is None or self.known[0]() is not cache or self.known[1] != cache.layout:
            self.known, self.graph = (weakref.ref(cache), cache.layout), None
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
    on_cuda = model.embed_tokens.weight.device.type == "cuda"
    if name == "auto" and how in (None, CompileOptions()) and on_cuda:
        return Graphed(Eager(model), if_possible=True)
    name = "eager" if name == "auto" else name
    if how not in (None, CompileOptions()) and name != "compile":
        raise ValueError(f"compile options are for --runner compile, and the runner is {name}; give one of them")
    if name == "graph" and not on_cuda:
        raise ValueError(
            "runner graph captures CUDA graphs and the device is no CUDA device; use --runner compile or eager"
        )
    makes_cpp = (how or CompileOptions()).backend == "inductor" and model.embed_tokens.weight.device.type == "cpu"
    if name == "compile" and makes_cpp and (reason := _no_cpp_compiling()):
        raise ValueError(f"runner compile {reason}; use --runner eager")
    if name == "graph":
        return Graphed(Eager(model))
    if name == "eager":
        return Eager(model)
    # these modes capture graphs of their own, one per block
    captures_itself = (how or CompileOptions()).mode in ("reduce-overhead", "max-autotune")
    return Graphed(Compiled(model, how)) if on_cuda and not captures_itself else Compiled(model, how)
