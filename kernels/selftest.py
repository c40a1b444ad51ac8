"""Run kernels once on small random inputs and compare them with their twins in fp64.

A kernel may be wrong on a device that nobody has tried, it may crash, and it may hang. So whoever wants to know runs
this in a process of its own, with a limit of time:

    python -m kernels.selftest cuda:0 bfloat16 4 128 decode append

The arguments are the device, the type, G, D, and the kernels. Each gets one line of JSON when it is done:
{"kernel": name, "why": why it failed, or nothing}.
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

# how far a kernel may be off, absolutely and relatively: its outputs and weights are rounded to the type
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
B, HKV, S = 2, 2, 200  # S fits no tile
POS = torch.arange(S, dtype=torch.int32).expand(B, HKV, S).contiguous()
NOW = torch.full((B, 1), S)


class Inputs:
    """Random inputs on the CPU for G query heads per KV head and D channels, the same ones each time."""

    def __init__(self, dtype: torch.dtype, group: int, dim: int):
        self.dtype, self.group, self.dim, self.generator = dtype, group, dim, torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, dtype=dtype)

    def query(self) -> Tensor:
        return self.normal(B, HKV * self.group, 1, self.dim)

    def keys(self, n: int = S) -> Tensor:
        return self.normal(B, HKV, n, self.dim)


def _decode(x: Inputs) -> tuple:
    return x.query(), x.keys(), x.keys(), x.integers(S, B, HKV), POS, NOW, None, "mean"


def _decode_quant(x: Inputs) -> tuple:
    k, v = reference.quantize(x.keys(192), 4, 64, 1), reference.quantize(x.keys(192), 4, 1, x.dim)
    exact = x.keys(40), x.keys(40), None, POS[:, :, :40] + 192
    return x.query(), k, v, POS[:, :, :192] % 5 != 0, POS[:, :, :192], NOW, None, (4, 4), exact


def _decode_ragged(x: Inputs) -> tuple:
    n = torch.tensor([[70, 1], [0, 129]], dtype=torch.int32)
    first = (n.flatten().cumsum(0) - n.flatten()).view(B, HKV, 1)
    spans = list(zip(first.flatten().tolist(), n.flatten().tolist(), strict=True))
    k, v = (x.normal(S, x.dim) for _ in range(2))
    return x.query(), k, v, spans, first, n, POS[0, 0], NOW, None


def _rebuild_keys(x: Inputs) -> tuple:
    a, b, frequency = x.normal(B, 10, 8, 32), x.normal(B, HKV, 32, x.dim), 1 / 10 ** torch.arange(x.dim // 2).float()
    ids, out = x.integers(10, B, HKV, 3), x.normal(B, HKV, 3, 8 * x.dim)
    return a, b, frequency, torch.zeros(B, dtype=torch.int32), ids, None, out


def _rotate(x: Inputs) -> tuple:
    angle = torch.randn(B, 1, 1, x.dim // 2, generator=x.generator)
    sin = angle.sin()
    return x.normal(B, 1, HKV * x.group, x.dim), angle.cos().repeat(1, 1, 1, 2), torch.cat((-sin, sin), -1)


def _take_slots(x: Inputs) -> tuple:
    sink = x.integers(4, B, HKV)
    first = (torch.arange(B * HKV) * 16).view(B, HKV, 1)
    slot_pos = torch.full((B * HKV * 16,), -1, dtype=torch.int32)
    return x.integers(40, B, HKV), sink + 1 + x.integers(9, B, HKV), sink, first, NOW, slot_pos


def _append(x: Inputs) -> tuple:
    rows = torch.randperm(B * HKV * S, generator=x.generator)[: B * HKV]
    return x.keys(1), x.keys(1), rows, x.keys(), x.keys()


CASES: dict[str, Callable[[Inputs], tuple]] = {
    "add_rms_norm": lambda x: (x.normal(2, 1, 300).float(), x.normal(2, 1, 300), torch.ones(300), 1e-5, x.dtype),
    "append": _append,
    "attention_scores": lambda x: (x.normal(B, HKV * x.group, 16, x.dim), x.keys(), S - 16, None, "mean"),
    "compact": lambda x: (x.keys(), x.keys(), POS, x.integers(S, B, HKV, 50, dtype=torch.int64)),
    "decode": _decode,
    "decode_quant": _decode_quant,
    "decode_ragged": _decode_ragged,
    "fetch_chunks": lambda x: (x.normal(B, HKV, 10, 64), x.integers(10, B, HKV, 3), None, x.normal(B, HKV, 3, 64)),
    "landmark_scores": lambda x: (x.query(), x.keys(), POS % 3 != 0),
    "linear": lambda x: (x.normal(1, 1, 300), x.normal(70, 300) / 16, x.normal(70)),
    "quantize": lambda x: (x.keys(192), 4, 64, 1),
    "rebuild_keys": _rebuild_keys,
    "rms_norm": lambda x: (x.normal(2, 1, 300).float(), torch.ones(300), 1e-5, x.dtype),
    "rotate": _rotate,
    "swiglu": lambda x: (x.normal(2, 1, 600),),
    "take_slots": _take_slots,
}
IN_PLACE = {"append": (3, 4), "fetch_chunks": (3,), "rebuild_keys": (6,), "take_slots": (0, 5)}  # arguments written to
EXACT = {"append", "compact", "fetch_chunks", "take_slots"}  # they move numbers


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested tuples with every tensor and dtype changed."""
    if isinstance(value, tuple):
        return tuple(mapped(x, change) for x in value)
    return change(value) if isinstance(value, (Tensor, torch.dtype)) else value


def wide(x: Tensor | torch.dtype) -> Tensor | torch.dtype:
    if isinstance(x, torch.dtype):
        return torch.float64
    return x.double() if x.is_floating_point() else x.clone()


def compare(name: str, device: torch.device, dtype: torch.dtype, group: int, dim: int) -> str:
    """Run one kernel and its twin → why it failed, or nothing."""
    given = CASES[name](Inputs(dtype, group, dim))
    of_twin = mapped(given, torch.clone if name in EXACT or name == "quantize" else wide)
    of_kernel = mapped(given, lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else x)
    right, found = getattr(reference, name)(*of_twin), getattr(kernels, name)(*of_kernel)
    if name == "quantize":
        return _compare_codes(*given[:2], mapped(found, Tensor.cpu), right)
    outputs = [(found, right), *((of_kernel[i], of_twin[i]) for i in IN_PLACE.get(name, ()))]
    flat_found, flat_right = (flat([pair[i] for pair in outputs]) for i in (0, 1))
    worst = 0.0
    for a, b in zip(flat_found, flat_right, strict=True):
        a, b = a.cpu().double(), b.double()
        if not a.isnan().equal(b.isnan()) or not a.isinf().equal(b.isinf()):
            return "gives NaN or infinity"
        off = (a - b).nan_to_num().abs() / (1.0 if name in EXACT else 1 + b.abs())
        worst = max(worst, float(off.max()) if off.numel() else 0.0)
    allowed = 0.0 if name in EXACT else CLOSE[dtype]
    return "" if worst <= allowed else f"is off by {worst:.2g} where {allowed:g} is allowed"


def _compare_codes(x: Tensor, bits: int, found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> str:
    """Why codes are wrong, or nothing. A GPU divides by a constant through its reciprocal, so a scale may be the next
    fp16 number, or the one after; then codes differ and are no worse.
    """
    near = torch.allclose(found[1].float(), right[1].float(), rtol=2**-9, atol=0.0) and found[2].equal(right[2])
    error = (reference.dequantize(*found, bits) - x.float()).abs().unflatten(2, (found[1].shape[2], -1))
    half = found[1].float()[:, :, :, None] / 2
    return "" if near and bool((error <= half * (1 + 1e-4)).all()) else "gives other codes or scales"


def flat(value: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in flat(part)] if isinstance(value, (list, tuple)) else []


def main(device: str, dtype: str, group: str, dim: str, names: Sequence[str]) -> None:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    for name in names:
        try:
            why = compare(name, where, getattr(torch, dtype), int(group), int(dim))
        except Exception as e:  # whatever a compiler or a driver raises
            why = f"fails with {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
        print(json.dumps({"kernel": name, "why": why}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5], sys.argv[5:])
