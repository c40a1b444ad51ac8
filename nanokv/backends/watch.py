"""Which function each operation of a backend really ran (--explain-backends).

The functions of an `Ops` are wrapped before a model is built on them. A wrapper notes its calls, their device, and the
torch operations that do the work inside: so a fused attention can be told from its plain form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanokv.backends.base import Ops

# torch operations that are worth naming: products and attention
NAMED = ("mm", "mv", "matmul", "linear", "attention", "dot")


@dataclass
class Call:
    """One operation on one device: how often it ran, and which torch operations worked in it."""

    function: str
    n: int = 0
    inside: Counter = field(default_factory=Counter)


class Calls:
    """(operation, device) → what ran."""

    def __init__(self):
        self.found: dict[tuple[str, str], Call] = {}

    def watched(self, ops: Ops) -> Ops:
        """The same backend with every function wrapped."""
        functions = {f.name: getattr(ops, f.name) for f in fields(ops)}
        return replace(
            ops, **{name: self._wrap(name, f) for name, f in functions.items() if callable(f) and name != "decodes_fp8"}
        )

    def _wrap(self, name: str, function: Callable) -> Callable:
        where = f"{function.__module__}.{function.__qualname__}"

        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():  # a compiled block is told by its runner
                return function(*args)
            device = next((str(x.device) for x in args if isinstance(x, Tensor)), "?")
            entry = self.found.setdefault((name, device), Call(where))
            entry.n += 1
            with CountOperations(entry.inside):
                return function(*args)

        return call

    def table(self, runner: str) -> str:
        """One line per operation and device, in the order in which they first ran."""
        lines = [f"{'operation':18}{'device':9}{'calls':>7}  function, and the torch operations in it"]
        for (name, device), call in self.found.items():
            inside = ", ".join(f"{op} x{n}" for op, n in call.inside.most_common(3))
            lines.append(f"{name:18}{device:9}{call.n:>7}  {call.function}{f' ({inside})' if inside else ''}")
        if runner != "eager":
            lines.append(f"decode steps ran as {RUNNERS[runner]}; calls inside them are not counted")
        return "\n".join(lines)


RUNNERS = {"compile": "blocks compiled by torch.compile", "graph": "one captured CUDA graph"}


class CountOperations(TorchDispatchMode):
    """Counts the named torch operations that run while it is on."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.__name__.partition(".")[0]
        if name == "scaled_dot_product_attention":  # chooses a kernel, which is what we want to see
            with self:
                return function.decompose(*args, **(kwargs or {}))
        if any(part in name for part in NAMED):
            self.counter[name] += 1
        return function(*args, **(kwargs or {}))
