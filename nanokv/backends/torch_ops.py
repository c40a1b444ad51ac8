"""Plain torch for every device: EAGER, the oracle that the other backends are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import reference
from nanokv.backends import inductor_cpu
from nanokv.backends.base import Ops


def eager_prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    return reference.prefill(q, k, v, start, sliding_window)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `reference.linear`. While compiling for a CPU, one row times a 16-bit weight is a loop that Inductor makes fast."""
    if compiles_for_cpu(x) and weight.itemsize == 2 and x.numel() == x.shape[-1]:
        return inductor_cpu.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def compiles_for_cpu(x: Tensor) -> bool:
    """Whether torch.compile traces what follows, for a CPU."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def refetch_all_when_compiling(fetch: Callable[..., None]) -> Callable[..., None]:
    """While compiling, every chunk is fetched again: the number of new ones would be a shape, and a graph has fixed
    shapes.
    """

    def fetch_chunks(chunks: Tensor, chunk_ids: Tensor, is_new: Tensor | None, out: Tensor) -> None:
        fetch(chunks, chunk_ids, None if torch.compiler.is_compiling() else is_new, out)

    return fetch_chunks


EAGER = Ops(
    name="eager",
    prefill=eager_prefill,
    prefill_scored=reference.prefill_scored_by(eager_prefill, reference.attention_scores),
    turn=reference.prefill,
    decode=reference.decode,
    decode_quant=reference.decode_quant,
    decode_ragged=reference.decode_ragged,
    attention_scores=reference.attention_scores,
    landmark_scores=reference.landmark_scores,
    rebuild_keys=reference.rebuild_keys,
    fetch_chunks=refetch_all_when_compiling(reference.fetch_chunks),
    compact=reference.compact,
    take_slots=reference.take_slots,
    take_lowest=reference.take_lowest,
    append=reference.append,
    quantize=reference.quantize,
    dequantize=reference.dequantize,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rotate=reference.rotate,
    swiglu=reference.swiglu,
    linear=linear,
)
