"""Compile the kernels for sm_80, sm_89 and sm_90 without a GPU, and check bounds on the machine code.

A kernel within the bounds can be limited by memory. A program that needs more instructions per cached token than the device issues while
that token crosses the bus is limited by instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, first

PER_TOKEN = {  # warp-instructions per cached token and KV head, G = 4, D = 128, on sm_90
    "decode _decode_split": 21,
    "scored _decode_split": 21,
    "ragged _decode_split": 21,
    "e4m3 _decode_split": 40,
    "e5m2 _decode_split": 40,
    "bf16 e4m3 _decode_split": 40,
    "bf16 e5m2 _decode_split": 40,
    "int4 runs 1 _decode_quant_split": 26,
    "int8 runs 1 _decode_quant_split": 50,
}
DOTS = [
    *PER_TOKEN,
    "masked _decode_split",
    "int4 masked _decode_quant_split",
    "int4 runs 4 _decode_quant_split",
    "int2 runs 4 _decode_quant_split",
    "rebuild _rebuild_keys",
    "scores _query_lse",
    "scores _key_scores",
    "many scores _query_lse",
    "many scores _key_scores",
]


# what `make test` compiles; all of them take minutes
FEW = ["decode _decode_split"]
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes of shared memory that one block can have


@pytest.fixture(scope="module", params=first(1, [(90, FEW), (80, []), (89, []), (90, [])]), ids=str)
def compiled(request, tmp_path_factory):
    arch, names = request.param
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = [sys.executable, str(ROOT / "tests" / "kernels" / "gates.py"), str(arch), *names]
    done = subprocess.run(program, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) - 1 == (len(names) or (32 if arch == 80 else 34))  # sm_80 has no e4m3
    return arch, found, found.pop("too large")


def test_nothing_spills_and_tiles_come_in_128_bits(compiled):
    arch, found, _ = compiled
    assert {name: m["stack"] for name, m in found.items() if m["stack"]} == {}
    assert {name: m["shared"] for name, m in found.items() if m["shared"] > SHARED[arch]} == {}
    for name in DOTS:
        if name in found:
            assert found[name]["mma"] > 0 and found[name]["wide_loads"] >= 12, name
    name = "landmarks _landmark_logits"
    assert name not in found or (found[name]["mma"] > 0 and found[name]["wide_loads"] >= 8)
    for name in ("fetch _fetch_chunks", "norm _rms_norm", "add_norm _rms_norm", "swiglu _swiglu", "linear _linear"):
        assert name not in found or found[name]["wide_loads"] > found[name]["narrow_loads"], name


def test_few_instructions_per_cached_token(compiled):
    arch, found, _ = compiled
    if arch == 90:
        assert {
            name: found[name]["per_token"]
            for name, most in PER_TOKEN.items()
            if name in found and not 0 < found[name]["per_token"] <= most
        } == {}


def test_the_gates_can_fail(compiled):
    """A tile too large for the registers shows."""
    assert compiled[2]["stack"] > 0
