"""Decode steps with torch.compile: how one block and the head are compiled, and how a step calls them."""

from __future__ import annotations

import difflib
import importlib
import json
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from subprocess import SubprocessError
from types import FunctionType
from typing import Any, get_origin

import torch
from torch import Tensor

from nanokv.cache.decode import KVCache
from nanokv.model.llama import Block, Llama

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
        for key, value in self.options.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, 3, 0.6)
                hint = f" (did you mean {' or '.join(close)}?)" if close else ""
                raise ValueError(f"torch's Inductor has no option {key!r}{hint}; see torch._inductor.config")
            allowed = importlib.import_module("torch._inductor.config").get_type(key)
            if get_origin(allowed) is None and not isinstance(value, allowed):
                raise ValueError(
                    f"compile option {key} is a {allowed.__name__}, and {value!r} is a {type(value).__name__}; "
                    "give JSON, as in max_autotune=true"
                )

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


class Compiled:
    """Compiles one block, and the head behind the last block, with torch.compile.

    A plan gets at most two graphs per kind of block, whatever the lengths (`ragged`, and on a CPU KV heads of fewer than
    18 slots or of more than 32,768, may need one more). Layers are of one kind if they agree in what decides a step's
    operations: whether they store, and which parts their store has. Before each call torch checks its guards. The weights
    and the program never change while this object lives, so only guards on the cache's layer and the inputs are kept.

    On a CPU the second step over the same memory is recorded and later ones are replayed, see `Recording`.
    """

    name = "compile"

    def __init__(self, model: Llama, how: CompileOptions | None = None, backend: Callable | None = None):
        """backend: instead of the one that `how` names, a function of a graph and its example inputs, for tests."""
        how = how or CompileOptions()
        self.model, self.compile_s = model, 0.0
        self.layout: object = None  # `KVCache.layout` at the last step
        self.recording: Recording | None = None
        self.recorder = CallRecorder() if model.embed_tokens.weight.device.type == "cpu" else None
        options = {}
        if backend is None and how.backend == "inductor":
            if self.recorder:
                options |= {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
            # torch.compile takes a mode or options, not both, so the mode is written out
            options |= _inductor().list_mode_options(how.mode) | dict(how.options)
        chosen = backend or how.backend
        if self.recorder:
            chosen, options = self.recorder.wrap(chosen, options), {}
        options["guard_filter_fn"] = lambda guards: [_keep_guard(guard) for guard in guards]
        given = {"backend": chosen, "fullgraph": True, "dynamic": how.dynamic}
        self.block, self.last_logits = (
            torch.compile(_own_code_object(f), options=dict(options), **given)
            for f in (Block.forward, Llama.last_logits)
        )

    def step(self, tokens: Tensor, pos: Tensor, cache: KVCache) -> Tensor:
        cache.freeze()
        x, angle = self.model.embed(tokens, pos)
        if self.layout is not cache.layout:
            self.layout, self.recording = cache.layout, None
        elif self.recording is not None:
            return self.recording.replay((x, pos, *angle))
        elif self.recorder:
            with self.recorder.recording() as calls:
                logits = self._run(x, pos, angle, cache)
            self.recording = Recording(calls, (x, pos, *angle), logits)
            return logits
        return self._run(x, pos, angle, cache)

    def _run(self, x: Tensor, pos: Tensor, angle: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """The step by compiled functions, which compile if no graph fits."""
        t0, before = time.perf_counter(), _n_compiled()
        try:
            with (
                # a process may see many plans; a number such as the norm's epsilon is a constant of its graph
                torch._dynamo.config.patch(recompile_limit=256, specialize_float=True),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")  # weights are fp16 where the cache is bf16
                warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of torch's own calls
                for block, layer in zip(self.model.layers, cache.layers, strict=True):
                    x = self.block(block, x, pos, angle, layer)
                out = self.last_logits(self.model, x)
        except Exception as e:
            if not _is_of_compiling(e):
                raise
            raise ValueError(f"runner compile: torch.compile fails here ({_reason(e)}); use --runner eager") from e
        if _n_compiled() > before:
            self.compile_s += time.perf_counter() - t0
        return out


Call = tuple[Callable, tuple, Sequence[Tensor]]  # a compiled graph, what it was given, what it returned


class CallRecorder:
    """Records each call of a compiled graph of one step. torch keeps this object as long as its graphs, so it
    must not hold the model.
    """

    def __init__(self) -> None:
        self.calls: list[Call] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Within this context the list gets each call of a graph."""
        self.calls = calls = []
        try:
            yield calls
        finally:
            self.calls = None

    def wrap(self, backend: str | Callable, options: Mapping[str, object]) -> Callable:
        """A backend for torch.compile: it compiles a graph as `backend` does, and records its calls."""
        compile_graph = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        patches = {"config_patches": options} if options else {}

        def compile_and_wrap(graph: Any, example_inputs: list) -> Callable:
            compiled = compile_graph(graph, example_inputs, **patches)

            def call(*args: Any) -> Sequence[Tensor]:
                out = compiled(*args)
                if self.calls is not None:
                    self.calls.append((compiled, args, out))
                return out

            return call

        return compile_and_wrap


class Recording:
    """The calls of compiled graphs in one step, made again with another token.

    A call of a compiled function checks guards and collects the graph's arguments in Python. Over the same memory each
    step calls the same graphs with the same tensors. Only two kinds are new: the step's inputs, and what an earlier
    graph of the step returned. The others are held weakly, so a cache that is dropped is freed.
    """

    def __init__(self, calls: Sequence[Call], inputs: Sequence[Tensor], logits: Tensor):
        """calls: of one step, in order. inputs: what the step was given. logits: what it returned."""
        # where a tensor stands in the list of the step's own tensors. `calls` keeps all alive, so no two have one id
        place = {id(x): i for i, x in enumerate(inputs)}
        self.calls, n = [], len(inputs)
        for graph, args, outs in calls:
            own = [(i, place[id(x)]) for i, x in enumerate(args) if id(x) in place]
            self.calls.append((graph, [_weakly(x) for x in args], own))
            place |= {id(x): n + i for i, x in enumerate(outs)}
            n += len(outs)
        self.logits = place[id(logits)]

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """The same calls for these inputs → logits (B,vocab)."""
        tensors = list(inputs)
        for graph, constants, own in self.calls:
            args = [constant() for constant in constants]
            for i, place in own:
                args[i] = tensors[place]
            tensors += graph(*args)
        return tensors[self.logits]


def _weakly(x: Any) -> Callable[[], Any]:
    """A function that returns x, and does not keep it alive if it is a tensor."""
    return weakref.ref(x) if isinstance(x, Tensor) else lambda: x


def _is_of_compiling(error: Exception) -> bool:
    """Whether torch.compile raised this while it compiled: by itself, or because a file or a program failed it."""
    from_torch = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return from_torch or isinstance(error, OSError | ImportError | SubprocessError)


def _reason(error: Exception) -> str:
    """The first line of the error, and of a compiler's own error."""
    lines = [x for x in str(error).splitlines() if not x.endswith("raised:")] or [type(error).__name__]
    at_fault = [line.strip() for line in lines[1:] if "error:" in line]
    return "; ".join([lines[0].strip(), *at_fault[:1]])


def no_cpp_compiling() -> str:
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
