"""Every kernel compiled for a GPU that is not here, as the wrappers launch it; prints what the machine code looks like as JSON.

A process of its own: `python tests/gates.py 90`, without TRITON_INTERPRET. The launch is taken down from the wrapper's own call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import aot
import torch
import triton.language as tl
from triton.runtime import JITFunction

from kernels import attention, chunks, codes, reference, rows, votes, writes

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
B, HKV, G, D, S = 1, 2, 4, 128, 512


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __getitem__(self, grid: tuple) -> Callable:
        return self.note

    def note(self, *args: object, **options: object) -> None:
        self.args, self.options = args, options


def launched(module: ModuleType, call: Callable[[], object]) -> dict[str, tuple[JITFunction, Recorder]]:
    """The kernels that a call launches, and with what."""
    real = {name: x for name, x in vars(module).items() if isinstance(x, JITFunction)}
    found = {name: (fn, Recorder()) for name, fn in real.items()}
    for name, (_, recorder) in found.items():
        setattr(module, name, recorder)
    try:
        call()
    finally:
        for name, fn in real.items():
            setattr(module, name, fn)
    return found


def machine(fn: JITFunction, call: Recorder, arch: int, more: dict) -> aot.Machine:
    given = dict(zip(fn.arg_names, call.args, strict=False)) | call.options | more
    warps, stages = given.pop("num_warps", 4), given.pop("num_stages", 3)
    signature, constants, unaligned = {}, {}, []
    static = {p.name for p in fn.params if p.is_constexpr}
    for name in fn.arg_names:
        x = given[name]
        if name in static or (isinstance(x, int) and x == 1):  # the launcher takes a 1 for a constant
            constants[name] = x
        elif isinstance(x, torch.Tensor):
            signature[name] = "*" + TYPES[x.dtype]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
            if isinstance(x, int) and x % 16:
                unaligned.append(name)
    return aot.compile(fn, signature, constants, arch, warps, stages, tuple(unaligned))


def kernels(kind: torch.dtype, fp8: bool) -> dict[str, tuple[JITFunction, Recorder, dict]]:
    """name → kernel, its launch, and what that would be on a GPU besides."""
    q = torch.randn(B, HKV * G, 1, D).to(kind)
    k, kpos, now = torch.randn(B, HKV, S, D).to(kind), torch.zeros(B, HKV, S, dtype=torch.int32), torch.full((B, 1), S)
    n, held = torch.full((B, HKV), S, dtype=torch.int32), torch.ones(B, HKV, S, dtype=torch.bool)
    found = {}

    def add(name: str, module: ModuleType, parts: str, call: Callable[[], object], more: dict | None = None):
        all_launched = launched(module, call)
        for part in parts.split():
            found[f"{name} {part}".strip("_")] = *all_launched[part], (more or {}) if part == "_split" else {}

    add("decode", attention, "_split _merge", lambda: attention.decode(q, k, k, n, kpos, now, None))
    add("masked", attention, "_split", lambda: attention.decode(q, k, k, held, kpos, now, 100))
    add("watched", attention, "_split _votes", lambda: attention.decode(q, k, k, n, kpos, now, None, "mean"))
    spans, first = [(h * S, S) for h in range(HKV)], torch.arange(0, HKV * S, S).view(B, HKV, 1)
    ask = q, k.view(-1, D), k.view(-1, D), spans, first, n, kpos.view(-1), now, None
    add("ragged", attention, "_split", lambda ask=ask: attention.decode_ragged(*ask))
    for name, other in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        if fp8 or other == torch.float8_e5m2:
            half, few = q.half(), k.half().to(other)
            add(name, attention, "_split", lambda h=half, f=few: attention.decode(h, f, f, n, kpos, now, None))
    near = k[:, :, :128].contiguous(), k[:, :, :128].contiguous(), None, kpos[:, :, :128]
    for bits, runs in ((4, 1), (4, 4), (2, 4), (8, 1)):
        codes_k, codes_v = reference.quantize(k, bits, 128, 1), reference.quantize(k, bits, 1, D // runs)
        ask = q, codes_k, codes_v, None, kpos, now, None, (bits, bits), near
        compute, fast = codes.unpacking((bits, bits), kind, fast=True)
        fast["COMPUTE"] = getattr(tl, str(compute).removeprefix("torch."))
        add(f"int{bits} runs {runs}", codes, "_split", lambda ask=ask: codes.decode_quant(*ask), fast)
        if (bits, runs) == (4, 1):  # as a frozen store asks: masks for both
            masked = *ask[:3], held, *ask[4:8], (*near[:2], held[:, :, :128], near[3])
            add("int4 masked", codes, "_split", lambda ask=masked: codes.decode_quant(*ask), fast)
    w = torch.randn(B, HKV * G, 32, D).to(kind)
    add("mass", votes, "_lse _columns", lambda: votes.mass(w, k, S - 32, None, "mean"))
    a, b, first = (
        torch.randn(B, S // 8, 8, 160).to(kind),
        torch.randn(B, HKV, 160, D).to(kind),
        torch.zeros(B, dtype=torch.int32),
    )
    ids, freq = torch.zeros(B, HKV, 32, dtype=torch.int32), torch.ones(D // 2)
    fresh, into, far = ids == 0, k.new_empty(B, HKV, 32, 8 * D), k.reshape(B, HKV, -1, 8 * D)
    add("landmarks", chunks, "_scores _greatest", lambda: chunks.landmarks(q, k, held))
    add("rebuild", chunks, "_rebuild", lambda: chunks.rebuild(a, b, freq, first, ids, fresh, into))
    add("fetch", chunks, "_fetch", lambda: chunks.fetch(far, ids, fresh, into))
    at = torch.zeros(B, HKV, 128, dtype=torch.int64)
    add("compact", writes, "_compact", lambda: writes.compact(k, k, kpos, at))
    add("append", writes, "_append", lambda: writes.append(k[:, :, :1], k[:, :, :1], at[0, :, 0].clone(), k, k))
    add("quantize k", writes, "_quantize", lambda: writes.quantize(k, 4, 128, 1))
    add("quantize v", writes, "_quantize", lambda: writes.quantize(k, 4, 1, 64))
    add("norm", rows, "_norm", lambda: rows.norm(torch.randn(1, 4096), torch.ones(4096), 1e-5))
    x = torch.randn(1, 4096)
    add("add_norm", rows, "_norm", lambda: rows.add_norm(x, x, torch.ones(4096), 1e-5))
    add("swiglu", rows, "_swiglu", lambda: rows.swiglu(torch.randn(1, 8192).to(kind)))
    add("linear", rows, "_linear", lambda: rows.linear(torch.randn(1, 4096), torch.randn(1024, 4096).to(kind), None))
    return found


def main(arch: int) -> None:
    found = {}
    for name, (fn, recorder, more) in kernels(torch.bfloat16, fp8=arch >= 89).items():
        m = machine(fn, recorder, arch, more)
        warps, tokens = recorder.options.get("num_warps", 4), recorder.options.get("N")
        facts = {
            k: getattr(m, k) for k in ("registers", "stack", "shared", "mma", "wide_loads", "narrow_loads", "loop")
        }
        found[name] = facts | {"per_token": m.loop * warps / tokens if tokens and m.loop else None}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
