"""Torch's path for a GPU, with slow fp64 loops in place of the three calls that only a GPU has, against the twins."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from nanokv.backends import torch_cuda

B, HKV, G, D = 2, 2, 3, 16


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Also small ranges and blocks, so that several are joined."""
    monkeypatch.setattr(torch_cuda, "efficient", efficient)
    monkeypatch.setattr(torch_cuda, "causal_flash", flash)
    monkeypatch.setattr(torch_cuda, "product", lambda a, b: (a.double() @ b.double()).float())
    monkeypatch.setattr(torch_cuda, "n_processors", lambda device: 7)
    monkeypatch.setattr(torch_cuda, "MIN_RANGE", 8)
    monkeypatch.setattr(torch_cuda, "MASKED_BLOCK", 4)
    monkeypatch.setattr(torch_cuda, "UNPACK_BLOCK", 24)


def efficient(q, k, v, bias):
    """Refuses what torch's kernel refuses, and K or V in memory of their own."""
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    logits = q.double() @ k.double().mT * q.shape[3] ** -0.5
    if bias is not None:
        assert bias.shape == logits.shape and bias.dtype == q.dtype
        assert bias.stride(3) == 1 and all(s % 8 == 0 for s in bias.stride()[:3]) and bias.storage_offset() % 8 == 0
        logits = logits + bias.double()
    return (logits.softmax(-1) @ v.double()).to(q.dtype), logits.logsumexp(-1).float()


def flash(q, k, v):
    (T, S), G = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(G, 1).mT * q.shape[3] ** -0.5
    later = torch.arange(S) > torch.arange(S - T, S)[:, None]
    logits = logits.masked_fill(later, -torch.inf)
    out = logits.softmax(-1) @ v.double().repeat_interleave(G, 1)
    return out.to(q.dtype), logits.logsumexp(-1).float()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found, right, close: float = 2e-5) -> None:
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=close, rtol=close)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("length", ["all", "counts", "mask"])
@pytest.mark.parametrize(("T", "S", "rows"), [(1, 61, 1), (1, 64, 2), (1, 3, 2), (6, 61, 2), (2, 40, 1)])
def test_decode(T, S, rows, length, window):
    """K and V are slices of a larger capacity; in the masked cases a head sees nothing."""
    q = normal(rows, HKV * G, T, D, seed=0)
    k, v = (normal(rows, HKV, S + 5, D, seed=i)[:, :, :S] for i in (1, 2))
    key_pos = torch.stack([torch.randperm(S, generator=torch.Generator().manual_seed(i)) for i in range(rows * HKV)])
    key_pos, query_pos = key_pos.view(rows, HKV, S).int(), torch.arange(S, S + T).expand(rows, T)
    seen = None
    if length != "all":
        seen = torch.randint(0, S + 1, (rows, HKV), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
        seen[0, 0] = 0
        seen = seen if length == "counts" else key_pos < seen[..., None]
    ask = q, k, v, seen, key_pos, query_pos, window
    same(torch_cuda.decode(*ask), reference.decode(*ask))


@pytest.mark.parametrize("over_group", ["mean", "max", "each"])
def test_scores(over_group):
    q, k, v = normal(B, HKV * G, 1, D, seed=0), normal(B, HKV, 50, D, seed=1), normal(B, HKV, 50, D, seed=2)
    key_pos, query_pos = torch.arange(50, dtype=torch.int32).expand(B, HKV, 50), torch.full((B, 1), 50)
    counts = torch.tensor([[50, 7], [0, 31]], dtype=torch.int32)
    for noise in (None, (3, 1.5, 0)):
        ask = q, k, v, counts, key_pos, query_pos, None, over_group, noise
        same(torch_cuda.decode(*ask), reference.decode(*ask))
    window = normal(1, HKV * G, 5, D, seed=3)
    ask = window, k[:1], 45, None, over_group
    same([torch_cuda.attention_scores(*ask)], [reference.attention_scores(*ask)])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("T", "start", "rows"), [(11, 0, 1), (11, 20, 1), (5, 0, 2), (1, 9, 1)])
def test_chunks_and_turns(T, start, rows, dtype, window):
    q = normal(rows, T, HKV * G, D, seed=0, dtype=dtype).transpose(1, 2)  # as projections leave them
    k, v = (normal(rows, start + T, HKV, D, seed=i, dtype=dtype).transpose(1, 2) for i in (1, 2))
    ask, close = (q, k, v, start, window), 2e-3 if dtype == torch.float16 else 2e-5
    same(torch_cuda.turn(*ask), reference.prefill(*ask), close)
    same([torch_cuda.prefill(*ask)], reference.prefill(*ask)[:1], close)


@pytest.mark.parametrize("bits", [(4, 4), (2, 8)])
@pytest.mark.parametrize("beside", [False, True])
def test_quantised(bits, beside):
    tokens, group = 80, 8
    k, v = normal(B, HKV, tokens, D, seed=1), normal(B, HKV, tokens, D, seed=2)
    k, v = reference.quantize(k, bits[0], group, 1), reference.quantize(v, bits[1], 1, 8)
    key_pos, query_pos = torch.arange(tokens, dtype=torch.int32).expand(B, HKV, -1), torch.full((B, 1), 90)
    exact = None
    if beside:
        more = normal(B, HKV, 10, D, seed=3), normal(B, HKV, 10, D, seed=4)
        exact = *more, None, torch.arange(80, 90, dtype=torch.int32).expand(B, HKV, -1)
    counts = torch.tensor([0, 24, 80]).repeat(B * HKV)[: B * HKV].view(B, HKV)
    for length in (None, key_pos % 3 != 0, counts):
        ask = normal(B, HKV * G, 1, D, seed=0), k, v, length, key_pos, query_pos, None, bits, exact
        same(torch_cuda.decode_quant(*ask), reference.decode_quant(*ask))


def test_the_comparisons_notice_a_wrong_range(monkeypatch):
    monkeypatch.setattr(torch_cuda, "equal_ranges", lambda n, ranges: [(0, n // ranges * ranges, ranges)])
    with pytest.raises(AssertionError):
        test_decode(1, 61, 1, "all", None)
