"""Run kernels once on small random inputs and compare them with their twins in fp64.

On a device that nobody has tried, a kernel may be wrong, crash or hang. So this runs in a process of its own, with a
limit of time (nanokv/backends/check.py):

    python -m kernels.selftest cuda:0 bfloat16 4 128 decode append

The arguments are the device, the type, G, D, and the kernels. Each gets one line of JSON when it is done:
{"kernel": name, "why": why it failed, or nothing}. A kernel whose case does not fit G and D is not used there either,
and passes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import reference

# how far a kernel may be off, as a share of its largest output: outputs and attention weights are rounded to the type
CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
CLOSE_QUANT = 3e-2  # scales are folded into rounded queries and weights
B, HKV, S = 2, 2, 200  # S fits no tile
POS = torch.arange(S, dtype=torch.int32).expand(B, HKV, S).contiguous()
NOW = torch.full((B, 1), S)


class Inputs:
    """Random inputs on the CPU for G query heads per KV head and D channels, the same ones each time."""

    def __init__(self, dtype: torch.dtype, group: int, dim: int):
        self.dtype, self.group, self.dim, self.generator = dtype, group, dim, torch.Generator().manual_seed(0)
        self.on_host: list[Tensor] = []  # these stay in the host's memory, pinned

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, dtype=dtype)

    def query(self) -> Tensor:
        return self.normal(B, HKV * self.group, 1, self.dim)

    def keys(self, n: int = S) -> Tensor:
        return self.normal(B, HKV, n, self.dim)

    def host(self, x: Tensor) -> Tensor:
        self.on_host.append(x)
        return x


def _decode(x: Inputs) -> list[tuple]:
    small = [k.half().to(torch.float8_e5m2) for k in (x.keys(), x.keys())]
    return [
        (x.query(), x.keys(), x.keys(), x.integers(S, B, HKV), POS, NOW, None, "mean"),
        (x.query(), x.keys(), x.keys(), POS % 5 != 0, POS, NOW, 90),
        (x.query(), *small, None, POS, NOW, None),
    ]


def _decode_quant(x: Inputs) -> list[tuple]:
    if x.dim % 4 or x.dim <= 32:
        return []
    cases, pos = [], POS[:, :, :192]
    counts, mask = 64 * x.integers(4, B, HKV), pos % 5 != 0
    for bits, runs, length in (((4, 4), 1, counts), ((8, 8), 2, mask), ((2, 2), 4, counts)):
        k = reference.quantize(x.keys(192), bits[0], 64, 1)
        v = reference.quantize(x.keys(192), bits[1], 1, x.dim // runs)
        exact = x.keys(40), x.keys(40), None if length is mask else x.integers(41, B, HKV), POS[:, :, :40] + 192
        cases.append((x.query(), k, v, length, pos, NOW, None, bits, exact))
    return cases


def _decode_ragged(x: Inputs) -> list[tuple]:
    n = torch.tensor([[70, 1], [0, 129]], dtype=torch.int32)
    first = (n.flatten().cumsum(0) - n.flatten()).view(B, HKV, 1)
    spans = list(zip(first.flatten().tolist(), n.flatten().tolist(), strict=True))
    k, v = (x.normal(S, x.dim) for _ in range(2))
    return [(x.query(), k, v, spans, first, n, POS[0, 0], NOW, None)]


def _quantize(x: Inputs) -> list[tuple]:
    if x.dim & x.dim - 1 or x.dim < 16:
        return []
    return [(x.keys(192), 4, 64, 1), (x.keys(192), 4, 1, x.dim), (x.keys(192), 2, 1, x.dim // 2)]


def _rebuild_keys(x: Inputs) -> list[tuple]:
    a, b, frequency = x.normal(B, 10, 8, 32), x.normal(B, HKV, 32, x.dim), 1 / 10 ** torch.arange(x.dim // 2).float()
    ids, out = x.integers(10, B, HKV, 3), x.normal(B, HKV, 3, 8 * x.dim)
    return [(a, b, frequency, torch.zeros(B, dtype=torch.int32), ids, None, out)]


def _rotate(x: Inputs) -> list[tuple]:
    angle = torch.randn(B, 1, 1, x.dim // 2, generator=x.generator)
    sin = angle.sin()
    return [(x.normal(B, 1, HKV * x.group, x.dim), angle.cos().repeat(1, 1, 1, 2), torch.cat((-sin, sin), -1))]


def _take_lowest(x: Inputs) -> list[tuple]:
    held = torch.stack([torch.randperm(16, generator=x.generator) for _ in range(B * HKV)]).view(B, HKV, 16).int()
    limit, first = 9 + x.integers(8, B, HKV), (torch.arange(B * HKV) * 16).view(B, HKV, 1)
    held = held.masked_fill(torch.arange(16) >= limit[..., None], -1)
    score = x.integers(4, B, HKV, 16).float()  # with equals
    score[0, 0] = torch.nan
    given = x.integers(24, B, HKV), limit, first, NOW - S + 18
    return [(score, held, *given, held.flatten().clone(), window) for window in (None, 9)]


def _take_slots(x: Inputs) -> list[tuple]:
    sink = x.integers(4, B, HKV)
    first = (torch.arange(B * HKV) * 16).view(B, HKV, 1)
    slot_pos = torch.full((B * HKV * 16,), -1, dtype=torch.int32)
    return [(x.integers(40, B, HKV), sink + 1 + x.integers(9, B, HKV), sink, first, NOW, slot_pos)]


def _append(x: Inputs) -> list[tuple]:
    rows = torch.randperm(B * HKV * S, generator=x.generator)[: B * HKV]
    return [(x.keys(1), x.keys(1), rows, x.keys(), x.keys()), (x.keys(1), x.keys(1), rows, x.keys(), x.host(x.keys()))]


def _attention_scores(x: Inputs) -> list[tuple]:
    few, many = (x.normal(B, HKV * x.group, n, x.dim) for n in (16, 150))
    return [
        (few, x.keys(), S - 16, None, "mean"),
        (many, x.keys(), S - 150, None, "max", "max"),
        (many, x.keys(), S - 150, 70, "each"),
    ]


def _fetch_chunks(x: Inputs) -> list[tuple]:
    ids, is_new = x.integers(10, B, HKV, 3), x.integers(2, B, HKV, 3) > 0
    chunks, out = (x.normal(B, HKV, n, 64) for n in (10, 3))
    return [(chunks, ids, None, out), (x.host(chunks.clone()), ids, is_new, out.clone())]


CASES: dict[str, Callable[[Inputs], list[tuple]]] = {
    "add_rms_norm": lambda x: [(x.normal(2, 1, 300).float(), x.normal(2, 1, 300), torch.ones(300), 1e-5, x.dtype)],
    "append": _append,
    "attention_scores": _attention_scores,
    "compact": lambda x: [(x.keys(), x.keys(), POS, x.integers(S, B, HKV, 50, dtype=torch.int64))],
    "decode": _decode,
    "decode_quant": _decode_quant,
    "decode_ragged": _decode_ragged,
    "fetch_chunks": _fetch_chunks,
    "landmark_scores": lambda x: [(x.query(), x.keys(), POS % 3 != 0)],
    "linear": lambda x: [(x.normal(1, 1, 300), x.normal(70, 300) / 16, x.normal(70))],
    "quantize": _quantize,
    "rebuild_keys": _rebuild_keys,
    "rms_norm": lambda x: [(x.normal(2, 1, 300).float(), torch.ones(300), 1e-5, x.dtype)],
    "rotate": _rotate,
    "swiglu": lambda x: [(x.normal(2, 1, 600),)],
    "take_lowest": _take_lowest,
    "take_slots": _take_slots,
}
# arguments written to
IN_PLACE = {"append": (3, 4), "fetch_chunks": (3,), "rebuild_keys": (6,), "take_lowest": (2, 6), "take_slots": (0, 5)}
EXACT = {"append", "compact", "fetch_chunks", "take_lowest", "take_slots"}  # they move numbers


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested tuples with every tensor and dtype changed."""
    if isinstance(value, tuple):
        return tuple(changed(x, change) for x in value)
    return change(value) if isinstance(value, (Tensor, torch.dtype)) else value


def in_fp64(x: Tensor | torch.dtype) -> Tensor | torch.dtype:
    if isinstance(x, torch.dtype):
        return torch.float64
    return x.double() if x.is_floating_point() else x.clone()


def compare(name: str, device: torch.device, dtype: torch.dtype, group: int, dim: int) -> str:
    """Run one kernel and its twin on every case → why it failed, or nothing."""
    inputs = Inputs(dtype, group, dim)
    whys = (_compare(name, given, inputs, device) for given in CASES[name](inputs))
    return next(filter(None, whys), "")


def _compare(name: str, given: tuple, inputs: Inputs, device: torch.device) -> str:
    def on_device(x: Tensor | torch.dtype) -> Tensor | torch.dtype:
        if isinstance(x, torch.dtype):
            return x
        if device.type == "cuda" and any(x is y for y in inputs.on_host):
            return x.clone().pin_memory()
        return x.to(device, copy=True)

    of_twin = changed(given, torch.clone if name in EXACT or name == "quantize" else in_fp64)
    of_kernel = changed(given, on_device)
    right, found = getattr(reference, name)(*of_twin), getattr(kernels, name)(*of_kernel)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what it wrote to the host is read next
    if name == "quantize":
        return _compare_codes(*given, changed(found, Tensor.cpu), right)
    outputs = [(found, right), *((of_kernel[i], of_twin[i]) for i in IN_PLACE.get(name, ()))]
    all_found, all_right = (tensors([pair[i] for pair in outputs]) for i in (0, 1))
    allowed = 0.0 if name in EXACT else CLOSE_QUANT if name == "decode_quant" else CLOSE[inputs.dtype]
    for a, b in zip(all_found, all_right, strict=True):
        a, b = a.cpu().double(), b.double()
        if not a.isnan().equal(b.isnan()) or not a.isinf().equal(b.isinf()):
            return "gives NaN or infinity"
        off, largest = (a - b).nan_to_num().abs(), b.nan_to_num(posinf=0, neginf=0).abs()
        worst = float(off.max() / largest.max().clamp(min=1e-30)) if off.numel() else 0.0
        if worst > allowed:
            return f"is off by {worst:.2g} where {allowed:g} is allowed"
    return ""


def _compare_codes(x: Tensor, bits: int, tokens: int, channels: int, found: tuple, right: tuple) -> str:
    """Why codes are wrong, or nothing. A GPU divides by a constant through its reciprocal, so a scale may be the next
    fp16 number, or the one after; then codes differ and are no worse.
    """
    near = torch.allclose(found[1].float(), right[1].float(), rtol=2**-9, atol=0.0) and found[2].equal(right[2])
    error = (reference.dequantize(*found, bits) - x.float()).abs()
    half = found[1].float().repeat_interleave(tokens, 2).repeat_interleave(channels, 3) / 2
    return "" if near and bool((error <= half * (1 + 1e-4)).all()) else "gives other codes or scales"


def tensors(value: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, (list, tuple)) else []


def main(device: str, dtype: str, group: str, dim: str, names: Sequence[str]) -> None:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    for name in names:
        why, is_over = "", False
        try:
            why = compare(name, where, getattr(torch, dtype), int(group), int(dim))
        except Exception as e:  # whatever a compiler or a driver raises
            why = f"fails with {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
            is_over = where.type == "cuda" and not _still_works(where)
        print(json.dumps({"kernel": name, "why": why}), flush=True)
        if is_over:
            sys.exit(f"{name} has broken the device for this process")


def _still_works(device: torch.device) -> bool:
    """Whether the device takes work after an error. A bad address, for one, ends it for the whole process."""
    try:
        torch.zeros(1, device=device).cpu()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main(*sys.argv[1:5], sys.argv[5:])
