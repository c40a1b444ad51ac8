"""The Triton kernels as a backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels import reference
from nanokv.backends.base import Ops
from nanokv.backends.torch_cpu import SDPA, sdpa_decode, sdpa_decode_quant
from nanokv.backends.torch_ops import linear, still


def triton() -> Ops:
    """SDPA with the kernels of `kernels/` for what they are made for: single tokens in 16 bits, and the votes of a prompt's last ones.

    Torch does the rest: several tokens at once, noise, fp32 (exact products spill there), and codes in groups or runs that fit no tile.
    """
    import kernels

    def decode(q, k, v, length, kpos, now, sliding_window, group=None, noise=None):
        if _suits(q) and q.shape[2] == 1 and noise is None:
            return kernels.decode(q, k, v, length, kpos, now, sliding_window, group)
        return sdpa_decode(q, k.to(q.dtype), v.to(q.dtype), length, kpos, now, sliding_window, group, noise)

    def reads(kind):  # before compute capability 8.9 no instruction turns e4m3 into anything
        old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
        return kind == torch.float8_e5m2 or not old

    def decode_quant(q, k, v, length, kpos, now, sliding_window, bits, near=None):
        group, runs = k[0].shape[2] // k[1].shape[2], v[1].shape[3]
        fits = 4 % runs == 0 and 3 not in bits and group & -group >= 16 and q.shape[3] % 4 == 0 and q.shape[3] > 32
        use = kernels.decode_quant if _suits(q) and q.shape[2] == 1 and fits else sdpa_decode_quant
        return use(q, k, v, length, kpos, now, sliding_window, bits, near)

    def decode_ragged(q, k, v, spans, first, length, kpos, now, sliding_window, group=None, noise=None):
        fits = _suits(q) and q.shape[2] == 1 and noise is None and any(n for _, n in spans)
        use = kernels.decode_ragged if fits else SDPA.decode_ragged
        return use(q, k, v, spans, first, length, kpos, now, sliding_window, group, noise)

    def landmarks(q, marks, seen):
        return (kernels.landmarks if _suits(q) else reference.landmarks)(q, marks, seen)

    def rebuild(a, b, inv_freq, first, ids, fresh, out):
        (kernels.rebuild if _moves(a) else reference.rebuild)(a, b, inv_freq, first, ids, fresh, out)

    def fetch(chunks, ids, fresh, out):
        (kernels.fetch if _moves(out) else still(reference.fetch))(chunks, ids, fresh, out)

    def compact(k, v, pos, at):
        straight = k.stride(3) == v.stride(3) == pos.stride(2) == 1
        return (kernels.compact if straight and _moves(k) else reference.compact)(k, v, pos, at)

    def append(k, v, row, keys, values):
        straight = k.stride(3) == v.stride(3) == 1 and k.shape == v.shape and k.dtype == keys.dtype
        (kernels.append if straight and _moves(k) else reference.append)(k, v, row, keys, values)

    def quantize(x, bits, tokens, channels):
        D = x.shape[-1]
        fits = bits != 3 and 1 in (tokens, channels) and D >= 16 and D & D - 1 == 0 and tokens <= 128 and _moves(x)
        return (kernels.quantize if fits else reference.quantize)(x, bits, tokens, channels)

    def mass(q, k, start, sliding_window, group, stat="sum", noise=None):
        use = kernels.mass if _suits(q) and stat == "sum" and noise is None and q.shape[2] <= 128 else reference.mass
        return use(q, k, start, sliding_window, group, stat, noise)

    def row(x, weight, bias):
        return (kernels.linear if x.numel() == x.shape[-1] else linear)(x, weight, bias)

    rows = {"norm": kernels.norm, "add_norm": kernels.add_norm, "swiglu": kernels.swiglu, "linear": row}
    moves = {"compact": compact, "append": append, "quantize": quantize}
    chunks = {"landmarks": landmarks, "rebuild": rebuild, "fetch": fetch}
    reads = {
        "decode": decode,
        "decode_quant": decode_quant,
        "decode_ragged": decode_ragged,
        "mass": mass,
        "reads": reads,
    }
    return replace(SDPA, name="triton", **reads, **moves, **chunks, **rows)


def _suits(q: Tensor) -> bool:
    """In the interpreter everything but bf16 does, which it computes wrongly."""
    return q.itemsize == 2 if q.device.type == "cuda" else q.dtype != torch.bfloat16


def _moves(x: Tensor) -> bool:
    """The interpreter has no bf16 to copy."""
    return x.device.type == "cuda" or x.dtype != torch.bfloat16


def triton_for(device: torch.device) -> Ops:
    try:
        from triton.knobs import runtime
    except ImportError:
        raise ValueError("backend triton needs the triton package; pip install triton, or use --backend sdpa") from None
    if device.type != "cuda" and not runtime.interpret:
        raise ValueError(
            f"backend triton makes code for CUDA devices and the device is {device.type}; use --backend sdpa"
        )
    return triton()
