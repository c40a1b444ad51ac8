"""Compile every kernel for a GPU that is not here, as the wrappers launch it, and print what the machine code looks like as JSON.

Run it as a process of its own, `python tests/kernels/gates.py 90`, without TRITON_INTERPRET. It records the launches that the
wrappers make. Names of kernels behind the architecture select some.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent)]

import aot
import torch
import triton.language as tl
from triton.runtime import JITFunction

from kernels import reference

NAMES = (
    "decode",
    "decode_quant",
    "gemv",
    "kv_write",
    "norm",
    "rope",
    "scores",
    "shadowkv",
    "_common",
)  # in kernels, `decode` is the function
decode, decode_quant, gemv, kv_write, norm, rope, scores, shadowkv, common = (
    import_module(f"kernels.{name}") for name in NAMES
)

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
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __getitem__(self, grid: tuple) -> Callable:
        return self.note

    def note(self, *args: object, **options: object) -> None:
        self.args, self.options = args, options


def launched(module: ModuleType, call: Callable[[], object]) -> dict[str, tuple[JITFunction, Recorder]]:
    """Return the kernels of a module and of kernels/_common.py by name, each with a recorder that holds the arguments of its
    launch.
    """
    real = [(m, name, x) for m in (module, common) for name, x in vars(m).items() if isinstance(x, JITFunction)]
    found = {name: (fn, Recorder()) for _, name, fn in real}
    for m, name, _ in real:
        setattr(m, name, found[name][1])
    try:
        call()
    finally:
        for m, name, fn in real:
            setattr(m, name, fn)
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
    """Return name → (kernel, its launch, arguments that would differ on a GPU)."""
    q = torch.randn(B, HKV * G, 1, D).to(kind)
    k, key_pos, query_pos = (
        torch.randn(B, HKV, S, D).to(kind),
        torch.zeros(B, HKV, S, dtype=torch.int32),
        torch.full((B, 1), S),
    )
    length, mask = torch.full((B, HKV), S, dtype=torch.int32), torch.ones(B, HKV, S, dtype=torch.bool)
    found = {}

    def add(name: str, module: ModuleType, parts: str, call: Callable[[], object], more: dict | None = None):
        all_launched = launched(module, call)
        for part in parts.split():
            found[f"{name} {part}"] = *all_launched[part], (more or {}) if part == "_decode_quant_split" else {}

    pos = key_pos, query_pos
    add("decode", decode, "_decode_split _merge_splits", lambda: decode.decode(q, k, k, length, *pos, None))
    add("masked", decode, "_decode_split", lambda: decode.decode(q, k, k, mask, *pos, 100))
    add("scored", decode, "_decode_split _decode_scores", lambda: decode.decode(q, k, k, length, *pos, None, "mean"))
    spans, first = [(h * S, S) for h in range(HKV)], torch.arange(0, HKV * S, S).view(B, HKV, 1)
    ask = q, k.view(-1, D), k.view(-1, D), spans, first, length, key_pos.view(-1), query_pos, None
    add("ragged", decode, "_decode_split", lambda ask=ask: decode.decode_ragged(*ask))
    for name, other in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        if fp8 or other == torch.float8_e5m2:
            few = k.half().to(other)
            for query, of in ((q.half(), ""), (q, "bf16 ")):
                add(
                    of + name,
                    decode,
                    "_decode_split",
                    lambda h=query, f=few: decode.decode(h, f, f, length, *pos, None),
                )
    exact = k[:, :, :128].contiguous(), k[:, :, :128].contiguous(), length, key_pos[:, :, :128]
    for bits, runs in ((4, 1), (4, 4), (2, 4), (8, 1)):
        codes_k, codes_v = reference.quantize(k, bits, 128, 1), reference.quantize(k, bits, 1, D // runs)
        ask = q, codes_k, codes_v, length, *pos, None, (bits, bits), exact
        compute, fast = decode_quant.unpack_ptx((bits, bits), kind, fast=True)
        fast["COMPUTE_DTYPE"] = getattr(tl, str(compute).removeprefix("torch."))
        split = "_decode_quant_split"
        add(f"int{bits} runs {runs}", decode_quant, split, lambda ask=ask: decode_quant.decode_quant(*ask), fast)
        if (bits, runs) == (4, 1):  # masks for both, as a ring of groups asks
            masked = *ask[:3], mask, *ask[4:8], (*exact[:2], mask[:, :, :128], exact[3])
            add("int4 masked", decode_quant, split, lambda ask=masked: decode_quant.decode_quant(*ask), fast)
    w = torch.randn(B, HKV * G, 32, D).to(kind)
    add("scores", scores, "_query_lse _key_scores", lambda: scores.attention_scores(w, k, S - 32, None, "mean"))
    many = torch.randn(B, HKV * G, 2048, D).to(kind)
    ask = many, k, S - 2048, None, "max", "max"
    add("many scores", scores, "_query_lse _key_scores", lambda ask=ask: scores.attention_scores(*ask))
    a, b, first = (
        torch.randn(B, S // 8, 8, 160).to(kind),
        torch.randn(B, HKV, 160, D).to(kind),
        torch.zeros(B, dtype=torch.int32),
    )
    ids, freq = torch.zeros(B, HKV, 32, dtype=torch.int32), torch.ones(D // 2)
    is_new, into, far = ids == 0, k.new_empty(B, HKV, 32, 8 * D), k.reshape(B, HKV, -1, 8 * D)
    both = "_landmark_logits _landmark_scores"
    add("landmarks", shadowkv, both, lambda: shadowkv.landmark_scores(q, k, mask))
    add("rebuild", shadowkv, "_rebuild_keys", lambda: shadowkv.rebuild_keys(a, b, freq, first, ids, is_new, into))
    add("fetch", shadowkv, "_fetch_chunks", lambda: shadowkv.fetch_chunks(far, ids, is_new, into))
    index = torch.zeros(B, HKV, 128, dtype=torch.int64)
    add("compact", kv_write, "_compact", lambda: kv_write.compact(k, k, key_pos, index))
    slot = index[0, :, 0].clone()
    add("append", kv_write, "_append", lambda: kv_write.append(k[:, :, :1], k[:, :, :1], slot, k, k))
    heads, first = torch.zeros(B, HKV, dtype=torch.int32), torch.zeros(B, HKV, 1, dtype=torch.int64)
    add(
        "take slots",
        kv_write,
        "_take_slots",
        lambda: kv_write.take_slots(*[heads] * 3, first, query_pos, key_pos.view(-1)),
    )
    score = torch.zeros(B, HKV, S)
    ask = score, key_pos, heads, heads, first, query_pos, key_pos.view(-1), None
    add("take lowest", kv_write, "_take_lowest", lambda ask=ask: kv_write.take_lowest(*ask))
    cos, heads_of_token = torch.randn(B, 1, 1, D), torch.randn(B, 1, HKV * G, D).to(kind)
    add("rotate", rope, "_rotate", lambda: rope.rotate(heads_of_token, cos, cos))
    add("quantize k", kv_write, "_quantize", lambda: kv_write.quantize(k, 4, 128, 1))
    add("quantize v", kv_write, "_quantize", lambda: kv_write.quantize(k, 4, 1, 64))
    x, ones = torch.randn(1, 4096), torch.ones(4096)
    add("norm", norm, "_rms_norm", lambda: norm.rms_norm(x, ones, 1e-5, kind))
    add("add_norm", norm, "_rms_norm", lambda: norm.add_rms_norm(x, x, ones, 1e-5, kind))
    add("swiglu", norm, "_swiglu", lambda: norm.swiglu(torch.randn(1, 8192).to(kind)))
    add("linear", gemv, "_linear", lambda: gemv.linear(x, torch.randn(1024, 4096).to(kind), None))
    return found


def main(arch: int, names: list[str]) -> None:
    found, every = {}, kernels(torch.bfloat16, fp8=arch >= 89)
    fn, recorder, more = every["decode _decode_split"]
    every = {name: every[name] for name in names or every}
    every["too large"] = fn, recorder, more | {"BLOCK_N": 32, "BLOCK_M": 32, "num_warps": 1}  # must be found to spill
    for name, (fn, recorder, more) in every.items():
        m = machine(fn, recorder, arch, more)
        warps, tokens = recorder.options.get("num_warps", 4), recorder.options.get("BLOCK_N")
        facts = {
            k: getattr(m, k) for k in ("registers", "stack", "shared", "mma", "wide_loads", "narrow_loads", "loop")
        }
        found[name] = facts | {"per_token": m.loop * warps / tokens if tokens and m.loop else None}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
