"""The Triton kernels as a backend."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from kernels import reference
from nanokv.backends.base import Ops, scored_by_kernel
from nanokv.backends.torch_cpu import SDPA
from nanokv.backends.torch_cuda import TORCH_CUDA
from nanokv.backends.torch_ops import linear, refetch_all_when_compiling


def triton_ops(device: torch.device) -> Ops:
    """Torch, with the kernels of `kernels/` where they fit: attention of a single token in 16 bits, attention scores, and for
    any number of tokens norms, rotation, SwiGLU, slots and copies.

    Torch computes the rest: attention of several tokens or in fp32, noise, and codes in groups or runs that fit no tile.
    """
    import kernels

    torch_ops = TORCH_CUDA if device.type in ("cuda", "meta") else SDPA

    def decode(q, k, v, length, key_pos, query_pos, sliding_window, over_group=None, noise=None):
        if _can_compute(q) and q.shape[2] == 1 and noise is None:
            return kernels.decode(q, k, v, length, key_pos, query_pos, sliding_window, over_group)
        k, v = k.to(q.dtype), v.to(q.dtype)
        return torch_ops.decode(q, k, v, length, key_pos, query_pos, sliding_window, over_group, noise)

    def decodes_fp8(kind):  # e4m3 needs compute capability 8.9
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
        return kind == torch.float8_e5m2 or not old

    def decode_quant(q, k, v, length, key_pos, query_pos, sliding_window, bits, exact=None):
        group, runs = k[0].shape[2] // k[1].shape[2], v[1].shape[3]
        fits = 4 % runs == 0 and 3 not in bits and group & -group >= 16 and q.shape[3] % 4 == 0 and q.shape[3] > 32
        use = kernels.decode_quant if _can_compute(q) and q.shape[2] == 1 and fits else torch_ops.decode_quant
        return use(q, k, v, length, key_pos, query_pos, sliding_window, bits, exact)

    def decode_ragged(q, k, v, spans, first, length, key_pos, query_pos, sliding_window, over_group=None, noise=None):
        fits = _can_compute(q) and q.shape[2] == 1 and noise is None and any(n for _, n in spans)
        use = kernels.decode_ragged if fits else torch_ops.decode_ragged
        return use(q, k, v, spans, first, length, key_pos, query_pos, sliding_window, over_group, noise)

    def landmark_scores(q, landmarks, visible):
        return (kernels.landmark_scores if _can_compute(q) else reference.landmark_scores)(q, landmarks, visible)

    def rebuild_keys(a, b, inv_freq, first, chunk_ids, is_new, out):
        use = kernels.rebuild_keys if _can_copy(a) else reference.rebuild_keys
        use(a, b, inv_freq, first, chunk_ids, is_new, out)

    def fetch_chunks(chunks, chunk_ids, is_new, out):
        (kernels.fetch_chunks if _can_copy(out) else refetch_all_when_compiling(reference.fetch_chunks))(
            chunks, chunk_ids, is_new, out
        )

    def compact(k, v, pos, index):
        straight = k.stride(3) == v.stride(3) == pos.stride(2) == 1
        return (kernels.compact if straight and _can_copy(k) else reference.compact)(k, v, pos, index)

    def append(k, v, row, keys, values):
        straight = k.stride(3) == v.stride(3) == 1 and k.shape == v.shape and k.dtype == keys.dtype
        (kernels.append if straight and _can_copy(k) else reference.append)(k, v, row, keys, values)

    def quantize(x, bits, tokens, channels):
        D = x.shape[-1]
        fits = bits != 3 and 1 in (tokens, channels) and D >= 16 and D & D - 1 == 0 and tokens <= 128 and _can_copy(x)
        return (kernels.quantize if fits else reference.quantize)(x, bits, tokens, channels)

    def attention_scores(q, k, start, sliding_window, over_group, over_queries="sum", noise=None, near=None):
        fits = _can_compute(q) and k.stride(3) == 1 and scored_by_kernel(over_group, over_queries, noise, near)
        use = kernels.attention_scores if fits else torch_ops.attention_scores
        return use(q, k, start, sliding_window, over_group, over_queries, noise, near)

    def rotate(x, cos, sin):
        return (kernels.rotate if x.stride(3) == 1 and _can_copy(x) else reference.rotate)(x, cos, sin)

    def row(x, weight, bias):
        return (kernels.linear if x.numel() == x.shape[-1] else linear)(x, weight, bias)

    rows = {
        "rms_norm": kernels.rms_norm,
        "add_rms_norm": kernels.add_rms_norm,
        "rotate": rotate,
        "swiglu": kernels.swiglu,
        "linear": row,
    }
    slots = {"take_slots": kernels.take_slots, "take_lowest": kernels.take_lowest}
    moves = {**slots, "compact": compact, "append": append, "quantize": quantize}
    chunks = {"landmark_scores": landmark_scores, "rebuild_keys": rebuild_keys, "fetch_chunks": fetch_chunks}
    attention = {
        "decode": decode,
        "decode_quant": decode_quant,
        "decode_ragged": decode_ragged,
        "attention_scores": attention_scores,
        "prefill_scored": reference.prefill_scored_by(torch_ops.prefill, attention_scores),
        "decodes_fp8": decodes_fp8,
    }
    return replace(
        torch_ops, name="triton", device_gather=True, has_kernels=True, **attention, **moves, **chunks, **rows
    )


def kernel_modules() -> list[ModuleType]:
    """The modules of the kernels, for those who count their launches."""
    import kernels

    modules = (getattr(kernels, name).__module__ for name in kernels.__all__)
    return [sys.modules[name] for name in (*modules, "kernels._common")]


def tuning_table(device: torch.device) -> tuple[dict, int]:
    """The table of how kernels are launched, with entries for this device, and its compute capability."""
    from kernels import tuning

    here = tuning.capability_of(device)
    for name in {name for name, _ in tuning.TABLE}:
        tuning.TABLE[name, here] = tuning.launch(name, device)
    return tuning.TABLE, here


def _can_compute(q: Tensor) -> bool:
    """Whether the kernels compute with this dtype: 16 bits on a GPU; in the interpreter all but bf16, which it
    computes wrongly.
    """
    return q.itemsize == 2 if q.device.type != "cpu" else q.dtype != torch.bfloat16


def _can_copy(x: Tensor) -> bool:
    """Whether the kernels copy this dtype: all on a GPU; the interpreter has no bf16."""
    return x.device.type != "cpu" or x.dtype != torch.bfloat16


def need_triton(device: torch.device) -> None:
    """ValueError if Triton makes no code for this device, or is not installed."""
    try:
        from triton.knobs import runtime
    except ImportError:
        raise ValueError("backend triton needs the triton package; pip install triton, or use --backend sdpa") from None
    if device.type != "cuda" and not runtime.interpret:
        raise ValueError(
            f"backend triton makes code for CUDA devices and the device is {device.type}; use --backend sdpa"
        )
