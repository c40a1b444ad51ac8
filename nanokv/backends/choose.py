"""Which backend a model gets, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch

from nanokv.backends import BACKENDS
from nanokv.backends.base import Ops
from nanokv.backends.torch_cuda import TORCH_CUDA
from nanokv.backends.triton import need_triton, triton_ops

Check = Callable[[Sequence[str]], dict[str, str]]  # kernels → why each cannot be used, or nothing (see check.py)


def choose(name: str, device: torch.device, dtype: torch.dtype, needs: Sequence[str], check: Check) -> Ops:
    """The backend of this name. auto on a CUDA device is triton if every kernel in `needs` passes the check, and plain
    torch if not; `Ops.why` says why. ValueError if this device cannot run it.
    """
    if name == "triton":
        need_triton(device)
        return replace(triton_ops(device), why="not checked, as asked")
    if device.type != "cuda" or name == "eager":
        return BACKENDS["sdpa" if name == "auto" else name]
    if name == "sdpa":
        return replace(TORCH_CUDA, why="as asked")
    if find_spec("triton") is None:
        return replace(TORCH_CUDA, why="triton is not installed")
    if dtype.itemsize > 2:
        return replace(TORCH_CUDA, why="the kernels compute in 16 bits")
    failed = [f"kernel {kernel} {why}" for kernel, why in check(needs).items() if why]
    if failed:
        more = f", and {len(failed) - 1} more" if failed[1:] else ""
        return replace(TORCH_CUDA, why=f"{failed[0]}{more}")
    return replace(triton_ops(device), why="kernels checked")
