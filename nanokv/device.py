"""Which device a model runs on, in which types prompts and single tokens are computed, and how much memory is free."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nanokv.backends.torch_cpu import few_rows_linear, row_linear
from nanokv.backends.torch_ops import linear
from nanokv.cache.report import mib
from nanokv.model.config import ModelConfig
from nanokv.model.presets import PRESETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def choose_device(name: str) -> torch.device:
    if name.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {name!r}; devices are auto, cpu, cuda, mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)  # Triton launches on the current device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} cannot be used here ({str(e).splitlines()[0]}); use --device cpu") from None
    return device


@dataclass(frozen=True)
class Precision:
    """The types in which prompts and single tokens are computed and in which keys and values are held, the function for
    matrix products, and the reason.
    """

    prefill: torch.dtype
    decode: torch.dtype
    cache: torch.dtype | None  # None: as for single tokens
    linear: Callable
    why: str


def choose_precision(config: ModelConfig, device: torch.device, asked: str) -> Precision:
    """The types for this device. They come from a table, not from timings: the same command must write the same text
    again.
    """
    cache = None
    if asked != "auto":
        names = [ALIASES.get(n, n) for n in asked.split("/")]
        if len(names) > 2 or any(n not in DTYPES for n in names):
            raise ValueError(
                f"unknown dtype {asked!r}; give auto, {', '.join(DTYPES)}, or prefill/decode as in bfloat16/float16"
            )
        first, second, why = DTYPES[names[0]], DTYPES[names[-1]], "asked for"
    elif device.type == "cuda":
        first = second = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        why = "the device's own"
    elif device.type != "cpu":
        first = second = torch.float16
        why = "the device's own"
    elif torch.cpu._is_amx_tile_supported():
        # 2 cores of an Emerald Rapids: prompts 2,300 GFLOP/s in bf16, 430 in fp32, 410 in fp16; one row streams
        # 24 GB/s of bf16 (with torch.mv; 16 with linear), 13 of fp16, 28 of fp32, which is twice the bytes
        first = second = torch.bfloat16
        why = "this CPU multiplies bf16 tiles"
    elif torch.cpu._is_avx512_bf16_supported():
        # 2 cores of a Zen 5: prompts 312 GFLOP/s in bf16, 75 in fp32, 22 in fp16; one row streams 42 GB/s of fp16,
        # 25 of bf16, 15 of fp32. So there are two copies of the weights, if the second one fits
        first, second = torch.bfloat16, torch.float16
        why = "this CPU multiplies bf16 best and streams fp16 best"
        # of one layer of smollm2-135m with 4,096 tokens, torch's attention takes 1.6 ms in fp16 and 0.37 ms in bf16
        cache = torch.bfloat16
        size = config.parameters() * 2
        if size > (free_bytes(device) - size) / 4:
            second, why = (
                first,
                "this CPU multiplies bf16 best; a second copy of the weights for single tokens would not fit",
            )
    else:
        first = second = torch.float32
        why = "this CPU has no bf16 arithmetic"
    product = linear
    if device.type == "cpu" and second == torch.bfloat16:
        product = row_linear
    elif device.type == "cpu" and second == torch.float32 and not torch.cpu._is_avx512_bf16_supported():
        # one core of a Zen 3, a weight of 49,152 × 576: one row 13 ms; 4 rows 30 ms as x @ Wᵀ and 16 as W @ xᵀ; 8 rows 34 and 30
        product = few_rows_linear
    return Precision(first, second, cache, product, why)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # of files, which gives way
            free = min(free, int(limit) - used)
        return free
    except (OSError, KeyError, ValueError):
        return sys.maxsize  # this system does not say


def check_weights(name: str, config: ModelConfig, device: torch.device, use: Precision) -> None:
    each = sum(t.itemsize for t in {use.prefill, use.decode})
    need, free = config.parameters() * each, free_bytes(device)
    if need > free:
        fits = [n for n, c in PRESETS.items() if c.parameters() * each < free * 0.9]
        types = " and ".join(dict.fromkeys(str(t).removeprefix("torch.") for t in (use.prefill, use.decode)))
        raise ValueError(
            f"{name} needs {mib(need)} in {types} and {mib(free)} are free on {device}; "
            + (f"these would fit: {', '.join(fits)}" if fits else "no known model would fit")
        )


def peak_bytes(device: torch.device) -> int:
    """The largest memory that this process has had on the device; on a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
