"""Count what one decode step asks of a GPU, without one: launches, allocated bytes, and waits for the host.

A cache is filled on the CPU. Then every tensor of the cache and of the model becomes a meta tensor, which has a shape
and no memory, and one step runs through the functions that a GPU would get. An operation of torch that computes
something counts as one launch, a view as none. A Triton kernel is replaced by a stand-in that counts its launches.
Reading a number of a meta tensor raises, so a wait for the host is seen. It shows no numbers, no races and no speed.

`python -m evals.launches --json results/epyc/launches.json`
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evals.record import commit, installed, machine
from nanokv import parse
from nanokv.backends.base import Ops
from nanokv.backends.torch_cpu import SDPA
from nanokv.backends.torch_cuda import TORCH_CUDA
from nanokv.backends.triton import kernel_modules
from nanokv.cache.plan import Plan
from nanokv.engine import Models, Session
from nanokv.model import loader
from nanokv.model.config import ModelConfig
from nanokv.model.presets import PRESETS
from nanokv.runner import Eager

MODEL, LAYERS, PROMPT, ROOM = "smollm2-135m", 4, 400, 32
PLANS = (
    "full",
    "streaming:budget=64",
    "snapkv:budget=64",
    "simlayer:variant=light",
    "adakv:budget=64",
    "h2o:budget=64",
    "tova:budget=64",
    "snapkv:budget=64,every=32",
    "full+fp8",
    "full+rot4",
    "full+int8:group=32",
    "full+int4:group=32",
    "snapkv:budget=64+int4:group=32",
    "streaming:budget=64+int4:group=32",
    "full+shadow:chunk=4,budget=64",
    "full+quest:chunk=4,budget=64",
    "full+offload",
    "full+kcache",
)


@dataclass
class Counted:
    """What ran in one step, inside the blocks and outside them."""

    in_blocks: Counter = field(default_factory=Counter)
    outside: Counter = field(default_factory=Counter)
    allocated: int = 0  # bytes of new tensors inside the blocks
    largest: int = 0  # bytes of the largest of them


class Waits(Exception):
    """A store declares that a step waits for the host, so there is nothing to count."""


class Count(TorchDispatchMode):
    """Counts the operations that compute something, and the bytes that they allocate."""

    def __init__(self):
        super().__init__()
        self.found, self.in_block = Counted(), False

    def note(self, name: str, new: Sequence[Tensor] = ()) -> None:
        (self.found.in_blocks if self.in_block else self.found.outside)[name] += 1
        self._allocate(new)

    def _allocate(self, new: Sequence[Tensor]) -> None:
        sizes = [x.untyped_storage().nbytes() for x in new] if self.in_block else []
        self.found.allocated += sum(sizes)
        self.found.largest = max([self.found.largest, *sizes])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [*tensors_in(args), *tensors_in(tuple((kwargs or {}).values()))]
        known = {x.untyped_storage()._cdata for x in given}
        new = [x for x in tensors_in((out,)) if x.untyped_storage()._cdata not in known]
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if "empty" in name:
            self._allocate(new)
        elif new or func._schema.is_mutable:
            self.note(name, new)
        return out


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among these values and in their lists and tuples."""
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


class Kernel:
    """Stands in for a Triton kernel: counts a launch and computes nothing."""

    def __init__(self, name: str, count: Count):
        self.name, self.count = name, count

    def __getitem__(self, grid: Any) -> Callable:
        return self.launch

    def launch(self, **arguments: Any) -> None:
        self.count.note(f"triton {self.name}")


@contextmanager
def counting() -> Iterator[Count]:
    """Count all operations and kernels that run inside."""
    from triton.runtime.jit import KernelInterface

    count, real = Count(), []
    for module in kernel_modules():
        real += [(module, key, x) for key, x in vars(module).items() if isinstance(x, KernelInterface)]
    for module, key, _ in real:
        setattr(module, key, Kernel(key.strip("_"), count))
    try:
        with count, torch.no_grad():
            yield count
    finally:
        for module, key, x in real:
            setattr(module, key, x)


def on_cpu_or_meta(cpu: Ops, gpu: Ops) -> Ops:
    """A backend that fills a cache on the CPU with `cpu` and runs meta tensors through `gpu`."""

    def choose(name: str) -> Callable:
        def call(*args: Any) -> Any:
            is_meta = any(x.device.type == "meta" for x in tensors_in(args))
            return getattr(gpu if is_meta else cpu, name)(*args)

        return call

    names = [f.name for f in fields(Ops) if callable(getattr(cpu, f.name)) and f.name != "decodes_fp8"]
    return replace(gpu, **{name: choose(name) for name in names})


def to_meta(*roots: object) -> None:
    """Replace every tensor that these objects reach by a meta tensor of the same shape, strides and dtype."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    seen: set[int] = set()

    def meta(x: Tensor) -> Tensor:
        if id(x) not in made:  # holding x keeps its id from being used again
            made[id(x)] = x, torch.empty_strided(tuple(x.shape), x.stride(), dtype=x.dtype, device="meta")
        return made[id(x)][1]

    def turned(x: Any) -> Any:
        if isinstance(x, Tensor):
            return meta(x)
        if isinstance(x, torch.device):
            return torch.device("meta")
        if isinstance(x, tuple) and type(x) is tuple:
            return tuple(turned(y) for y in x)
        walk(x)
        return x

    def walk(x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, nn.Module):
            for name, p in x._parameters.items():
                if p is not None:
                    x._parameters[name] = nn.Parameter(meta(p), requires_grad=False)
        if isinstance(x, (list, dict)):
            for key, value in list(enumerate(x) if isinstance(x, list) else x.items()):
                x[key] = turned(value)
        elif type(x).__module__.startswith(("nanokv", "torch.nn")) and hasattr(x, "__dict__"):
            for key, value in list(vars(x).items()):
                if key != "_parameters":
                    if is_dataclass(x):
                        object.__setattr__(x, key, turned(value))
                    else:
                        vars(x)[key] = turned(value)

    for root in roots:
        walk(root)


def models_of(ops: Ops, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Models:
    """A model of random weights, which fills caches on the CPU and runs meta tensors through `ops`."""
    ops = on_cpu_or_meta(SDPA, ops)
    llama = loader.empty(config, ops, torch.device("cpu"), dtype)
    loader.randomise(llama)
    return Models(llama, llama, ops, Eager(llama))


def step(models: Models, plan: Plan, frozen: bool = True, tokens: int = 1) -> tuple[Counted, int]:
    """Run one step over meta tensors → what ran, and the bytes of the cache. `models` cannot be used afterwards.

    frozen: with static shapes, as in a CUDA graph. tokens: more than one is a piece of a turn. Waits if a store
    declares that a step waits for the host; RuntimeError if one waits that does not declare it.
    """
    session = Session(models, plan, ROOM)
    session.start([[i % models.decode.config.vocab_size for i in range(PROMPT)]])
    cache, size = session.cache, session.report().bytes
    if frozen:
        cache.freeze()
    to_meta(cache, models.decode)
    if cache.needs_host_sync:
        raise Waits(f"a step over {plan} waits for the host, or copies on a stream of its own")
    ids, pos = (torch.empty(1, tokens, dtype=torch.long, device="meta") for _ in range(2))
    with counting() as count:

        def block(run: nn.Module, *args: Any) -> Tensor:
            count.in_block = True
            out = run(*args)
            count.in_block = False
            return out

        models.decode.logits(models.decode.hidden(ids, pos, cache, block)[:, -1])
    return count.found, size


def row(name: str, backend: str, ops: Ops) -> dict:
    """One plan's line of the table."""
    entry = {"plan": name, "backend": backend}
    try:
        found, size = step(models_of(ops, replace(PRESETS[MODEL], num_hidden_layers=LAYERS)), parse(name))
    except Waits as e:
        return entry | {"waits": str(e).splitlines()[0][:100]}
    each = {key: n / LAYERS for key, n in found.in_blocks.most_common()}
    kernels = sum(n for key, n in each.items() if key.startswith("triton"))
    return entry | {
        "launches_per_layer": sum(each.values()),
        "of_triton": kernels,
        "launches_outside": found.outside.total(),
        "allocated_per_layer": found.allocated / LAYERS,
        "cache_per_layer": size / LAYERS,
        "operations": each,
    }


def main() -> int:
    from nanokv.backends.triton import triton_ops

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    args = parser.parse_args()
    record = {
        "command": "python -m evals.launches " + shlex.join(sys.argv[1:]),
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "model": f"{MODEL}, {LAYERS} layers",
        "dtype": "bfloat16",
        "launches": [],
    }
    for name in args.plans:
        for backend, ops in (("triton", triton_ops(torch.device("meta"))), ("sdpa", TORCH_CUDA)):
            entry = row(name, backend, ops)
            record["launches"].append(entry)
            if "waits" in entry:
                print(f"{name:40} {backend:8} waits for the host: {entry['waits']}")
            else:
                print(
                    f"{name:40} {backend:8} {entry['launches_per_layer']:6.1f} launches per layer, "
                    f"{entry['allocated_per_layer'] / 1024:8.0f} KiB allocated beside {entry['cache_per_layer'] / 1024:.0f}"
                )
    args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
