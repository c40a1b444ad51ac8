"""Plain torch for every device: EAGER, the oracle that other backends are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from nanokv.backends import inductor_cpu as forms
from nanokv.backends.base import Ops


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim; x and weight fp32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + delta
    return x, norm(x, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…,C) in any type, computed and returned in the weight's."""
    if fused(x) and weight.itemsize == 2 and x.numel() == x.shape[-1]:
        return forms.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight, bias)


def fused(x: Tensor) -> bool:
    """Whether Inductor is going to make C++ loops of what follows."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def swiglu(gate_up: Tensor) -> Tensor:
    """(…,2C), the gate's half first → (…,C)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def eager_prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    return reference.prefill(q, k, v, start, sliding_window)[0]


def still(move: Callable[..., None]) -> Callable[..., None]:
    """While compiling, everything is fetched again: how many chunks are new is a shape that no graph can have."""

    def moved(*given: Tensor | None) -> None:
        *what, fresh, out = given
        move(*what, None if torch.compiler.is_compiling() else fresh, out)

    return moved


EAGER = Ops(
    "eager",
    eager_prefill,
    reference.prefill,
    reference.decode,
    reference.decode_quant,
    reference.decode_ragged,
    reference.mass,
    reference.landmarks,
    reference.rebuild,
    still(reference.fetch),
    reference.compact,
    reference.append,
    reference.quantize,
    reference.dequantize,
    norm,
    add_norm,
    swiglu,
    linear,
)
