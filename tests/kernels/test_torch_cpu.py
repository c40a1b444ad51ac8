"""Torch's path for a CPU against the twins, which compute in fp64 here."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from nanokv.backends import torch_cpu

HKV, G, D = 2, 3, 16


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("window", [None, 6, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("T", "start", "rows"), [(11, 0, 1), (11, 20, 1), (5, 0, 2), (7, 30, 2), (1, 9, 1)])
def test_chunks_and_turns(T, start, rows, dtype, window):
    """K and V are slices of a larger capacity, as a half-filled cache has them."""
    q = normal(rows, T, HKV * G, D, seed=0, dtype=dtype).transpose(1, 2)  # as projections leave them
    k, v = (normal(rows, HKV, start + T + 3, D, seed=i, dtype=dtype)[:, :, : start + T] for i in (1, 2))
    right, right_lse = reference.prefill(q.double(), k.double(), v.double(), start, window)
    out, lse = torch_cpu.sdpa_turn(q, k, v, start, window)
    close = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for found in (out, torch_cpu.sdpa_prefill(q, k, v, start, window)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, atol=close, rtol=close)
    torch.testing.assert_close(lse.double(), right_lse.double(), atol=close, rtol=close)
