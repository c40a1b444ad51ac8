"""Torch's path for a CPU against the twins, which compute in fp64 here."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from kernels import reference
from nanokv.backends import bf16_cpu, torch_cpu

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


@pytest.mark.parametrize("start", [0, 20])
def test_attention_as_products(start, monkeypatch):
    """The last block of queries is shorter than the others. Queries and keys are as long as those of real models."""
    monkeypatch.setattr(bf16_cpu, "ROWS", G * 4)
    q = normal(2, 11, HKV * G, D, seed=0, dtype=torch.bfloat16).transpose(1, 2) * 8
    k, v = (normal(2, HKV, start + 14, D, seed=i, dtype=torch.bfloat16)[:, :, : start + 11] for i in (1, 2))
    right, right_lse = reference.prefill(q.double(), k.double(), v.double(), start, None)
    out, lse = bf16_cpu.attend(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), right, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), right_lse.double(), atol=1e-5, rtol=1e-5)  # logits are not rounded to bf16


def test_prompts_and_turns_take_products_where_these_apply(monkeypatch):
    q = normal(1, HKV * G, 9, D, seed=0, dtype=torch.bfloat16)
    k, v = (normal(1, HKV, 15, D, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    right, right_lse = reference.prefill(q.double(), k.double(), v.double(), 6, None)
    calls, real = [], bf16_cpu.attend
    monkeypatch.setattr(bf16_cpu, "applies", lambda q, k: True)
    monkeypatch.setattr(bf16_cpu, "attend", lambda *args, **given: calls.append(given) or real(*args, **given))
    out, lse = torch_cpu.sdpa_turn(q, k, v, 6, None)
    for found in (out, torch_cpu.sdpa_prefill(q, k, v, 6, None)):
        torch.testing.assert_close(found.double(), right, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), right_lse.double(), atol=1e-5, rtol=1e-5)
    torch_cpu.sdpa_turn(q, k, v, 6, 4), torch_cpu.sdpa_prefill(q, k, v, 6, 4)  # a sliding window hides keys
    assert calls == [{"causal": True}, {"causal": True, "with_lse": False}]


def test_products_apply_to_many_bf16_queries_on_a_cpu_that_multiplies_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    q, k = torch.zeros(1, 4, 100, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 2000, 8, dtype=torch.bfloat16)
    assert bf16_cpu.applies(q, k)
    assert not bf16_cpu.applies(q[:, :, :1], k) and not bf16_cpu.applies(q, k[:, :, :999])
    for q_type, k_type in ((torch.half, torch.half), (torch.float, torch.float), (torch.half, torch.bfloat16)):
        assert not bf16_cpu.applies(q.to(q_type), k.to(k_type))
    assert not bf16_cpu.applies(q.to("meta"), k.to("meta"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not bf16_cpu.applies(q, k)


@pytest.mark.parametrize("masked", [False, True])
def test_a_turn_over_stored_tokens_as_products(masked, monkeypatch):
    """One head sees all slots, one sees 9 of 20, and one row's head sees none."""
    monkeypatch.setattr(bf16_cpu, "applies", lambda q, k: True)
    q = normal(2, HKV * G, 5, D, seed=0, dtype=torch.bfloat16) * 8
    k, v = (normal(2, HKV, 20, D, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    length = torch.tensor([[20, 9], [0, 20]]) if masked else None
    pos = torch.arange(20).expand(2, HKV, 20), torch.arange(20, 25).expand(2, 5)
    right, right_lse, _ = reference.decode(q.double(), k.double(), v.double(), length, *pos, None)
    out, lse, _ = torch_cpu.sdpa_decode(q, k, v, length, *pos, None)
    torch.testing.assert_close(out.double(), right, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), right_lse.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("over_queries", ["sum", "max", "count_low"])
def test_attention_scores_as_products(over_queries, window, monkeypatch):
    monkeypatch.setattr(bf16_cpu, "applies", lambda q, k: True)
    q, k = (normal(2, n, T, 48, seed=n, dtype=torch.bfloat16) * 4 for n, T in ((HKV * G, 21), (HKV, 30)))
    right = reference.attention_scores(q.double(), k.double(), 9, window, "mean", over_queries)
    found = torch_cpu.attention_scores(q, k, 9, window, "mean", over_queries)
    torch.testing.assert_close(found.double(), right.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("how", [("max", "max"), ("mean", "sum")])
@pytest.mark.parametrize("scored", [None, [(0, 12)], [(0, 2), (5, 9)], [(0, 2), (2, 9)], [(0, 0), (3, 12)]])
def test_a_scoring_pass(scored, how, window, monkeypatch):
    """A prompt of 12 tokens, and 14 of a pass, whose first three came in an earlier chunk. With products, in blocks of four queries,
    and without.
    """
    monkeypatch.setattr(bf16_cpu, "ROWS", G * 4)
    n, start, T = 12, 15, 11
    q = normal(2, T, HKV * G, D, seed=0, dtype=torch.bfloat16).transpose(1, 2) * 4
    k, v = (normal(2, HKV, start + T, D, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    right, _ = reference.prefill(q.double(), k.double(), v.double(), start, window)
    scores = torch.zeros(2, HKV * G, T, n, dtype=torch.float64)
    among = [j for a, b in scored or [(0, n)] for j in range(a, b)]
    for b, h, i in itertools.product(range(2), range(HKV * G), range(T)):
        sees = [j for j in [*among, *range(n, start + i + 1)] if scored or not window or j > start + i - window]
        logits = torch.tensor([(q[b, h, i].double() @ k[b, h // G, j].double()).item() for j in sees]) * D**-0.5
        for j, weight in zip(sees, logits.softmax(0), strict=True):
            if j < n:
                scores[b, h, i, j] = weight
    scores = scores.unflatten(1, (HKV, G))
    scores = scores.amax((2, 3)) if how[0] == "max" else scores.mean(2).sum(2)
    for as_products in (False, True):
        monkeypatch.setattr(bf16_cpu, "applies", lambda q, k, said=as_products: said)
        out, found = torch_cpu.prefill_scored(q, k, v, start, window, n, scored, *how, None, None)
        torch.testing.assert_close(out.double(), right, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(found.double(), scores, atol=1e-5, rtol=1e-5)


def test_scores_of_a_pass_come_from_attention_itself(monkeypatch):
    q, k = (normal(1, m, T, D, seed=m, dtype=torch.bfloat16) for m, T in ((HKV * G, 4), (HKV, 9)))
    monkeypatch.setattr(bf16_cpu, "applies", lambda q, k: True)
    monkeypatch.setattr(torch_cpu, "attention_scores", None)
    k[:, :, 0], q[:] = 40, 40  # this key, which is not scored, outweighs all others
    _, scores = torch_cpu.prefill_scored(q, k, k, 5, None, 5, [(1, 5)], "max", "max", None, None)
    assert not scores.any()


def test_noisy_scores_of_a_pass_are_taken_with_their_noise(monkeypatch):
    q, k = (normal(1, m, T, D, seed=m, dtype=torch.bfloat16) for m, T in ((HKV * G, 4), (HKV, 9)))
    given = q, k, k, 5, None, 5, [(0, 5)], "max", "max", (3, 1.0, 0), None
    monkeypatch.setattr(bf16_cpu, "applies", lambda q, k: True)
    right = reference.attention_scores(q.double(), k.double(), 5, None, "max", "max", (3, 1.0, 0))[:, :, :5]
    torch.testing.assert_close(torch_cpu.prefill_scored(*given)[1].double(), right.double(), atol=1e-4, rtol=1e-4)


def test_two_threads_leave_the_setting_of_onednn_as_it_was():
    matmul, entered = torch.backends.mkldnn.matmul, threading.Event()
    before = matmul.fp32_precision

    def other() -> None:
        entered.set()
        with bf16_cpu.fp32_by_onednn():
            pass

    with bf16_cpu.fp32_by_onednn():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        thread.join(0.2)  # without a lock it would be through, or hold the wrong value
        assert thread.is_alive() and matmul.fp32_precision == "bf16"
    thread.join()
    assert matmul.fp32_precision == before


def test_the_setting_of_onednn_is_put_back():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), bf16_cpu.fp32_by_onednn():
        assert matmul.fp32_precision == "bf16"
        _ = 1 / 0
    assert matmul.fp32_precision == before
