"""What only a GPU can show: kernels in bf16 against fp64, a captured step against plain calls, and that a step never waits.

`python -m pytest tests/gpu` on a machine with CUDA; skipped elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import kernels
from kernels import reference
from nanokv import load, parse
from nanokv.engine import Session
from nanokv.runner import Compiled, Eager, Graphed

pytestmark = pytest.mark.gpu
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    dice = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=dice, device="cuda").to(dtype)


def near_truth(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """No further from fp64 than twice what plain torch is in the same type."""
    ours, theirs = ((x.double() - truth).abs().max().item() for x in (found, plain))
    assert found.isfinite().all() and ours <= 2 * theirs + 1e-6, (ours, theirs)


def wide(*xs: object) -> list[object]:
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in xs]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "heads", "G", "S", "D"), [(1, 8, 4, 4096, 128), (3, 3, 3, 1000, 64), (2, 32, 1, 777, 128), (1, 2, 5, 33, 96)]
)
@pytest.mark.parametrize("window", [None, 300])
def test_decode(B, heads, G, S, D, window, dtype):
    q, k, v = (
        normal(B, n, s, D, dtype=dtype, seed=i) for i, (n, s) in enumerate(((heads * G, 1), (heads, S), (heads, S)))
    )
    length = torch.randint(0, S + 1, (B, heads), device="cuda", dtype=torch.int32)
    kpos = torch.arange(S, device="cuda", dtype=torch.int32).expand(B, heads, S).contiguous()
    rest = length, kpos, torch.full((B, 1), S, device="cuda"), window, "mean"
    found, plain, truth = (
        kernels.decode(q, k, v, *rest),
        reference.decode(q, k, v, *rest),
        reference.decode(*wide(q, k, v), *rest),
    )
    seen = truth[1].isfinite()
    near_truth(found[0], plain[0], truth[0])
    near_truth(found[1][seen], plain[1][seen], truth[1][seen].double())
    near_truth(found[2], plain[2], truth[2].double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("bits", "runs"), [((4, 4), 1), ((4, 4), 4), ((2, 2), 4), ((8, 8), 1), ((8, 4), 2), ((4, 2), 1)]
)
@pytest.mark.parametrize("near", [False, True])
def test_decode_quant(bits, runs, near, dtype):
    B, heads, G, S, D = 2, 4, 4, 1024, 128
    q, k, v = (
        normal(B, n, s, D, dtype=dtype, seed=i) for i, (n, s) in enumerate(((heads * G, 1), (heads, S), (heads, S)))
    )
    k, v = reference.quantize(k, bits[0], 64, 1), reference.quantize(v, bits[1], 1, D // runs)
    kpos = torch.arange(S, device="cuda", dtype=torch.int32).expand(B, heads, S).contiguous()
    exact = None
    if near:
        exact = [normal(B, heads, 100, D, dtype=dtype, seed=i) for i in (5, 6)]
        exact = *exact, torch.rand(B, heads, 100, device="cuda") > 0.3, kpos[:, :, :100]
    rest = k, v, None, kpos, torch.full((B, 1), S, device="cuda"), None, bits, exact
    found, plain = kernels.decode_quant(q, *rest), reference.decode_quant(q, *rest)
    truth = reference.decode_quant(q.double(), *rest)
    for a, b, c in zip(found, plain, truth, strict=True):
        ours, theirs = ((x.double() - c.double()).abs().max().item() for x in (a, b))
        # scaled queries and weights are rounded once more than an exact key would be
        assert a.isfinite().all() and ours <= 4 * theirs + (2e-3 if dtype == torch.bfloat16 else 3e-4), (ours, theirs)


@pytest.mark.parametrize("dtype", TYPES)
def test_mass_and_rows(dtype):
    q, k = normal(1, 32, 32, 128, dtype=dtype, seed=0), normal(1, 8, 3000, 128, dtype=dtype, seed=1)
    rest = 3000 - 32, None, "mean"
    near_truth(kernels.mass(q, k, *rest), reference.mass(q, k, *rest), reference.mass(*wide(q, k), *rest).double())
    x, w, gate = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((1, 1, 4096), (11008, 4096), (1, 1, 22016))))
    near_truth(kernels.linear(x, w, None), reference.linear(x, w, None), (x.double() @ w.double().T))
    near_truth(kernels.swiglu(gate), reference.swiglu(gate), reference.swiglu(gate.double()))
    ones = torch.ones(4096, device="cuda")
    near_truth(
        kernels.norm(x, ones, 1e-5), reference.norm(x, ones, 1e-5), reference.norm(x.double(), ones.double(), 1e-5)
    )


PLANS = [
    "full",
    "snapkv:budget=128",
    "streaming:sink=4,recent=60",
    "h2o:budget=128",
    "full+int4",
    "streaming:sink=4,recent=60+int4:group=16,residual=16",
]


@pytest.fixture(scope="module")
def llm():
    return load("llama3.2-1b", random_weights=True, device="cuda", backend="triton")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", [Graphed, Compiled])
def test_the_fast_runners_give_the_tokens_of_plain_calls_and_never_wait(plan, kind, llm):
    texts = []
    for runner in (Eager(llm.models.decode), kind(llm.models.decode)):
        session = Session(replace(llm.models, runner=runner), parse(plan), 90)
        out, found = session.start([list(range(3, 403))]), []
        for i in range(80):  # past two flushes of a group
            found.append(out.argmax(-1, keepdim=True))
            if i > 3:
                torch.cuda.set_sync_debug_mode("error")
            with torch.inference_mode():
                out = runner.step(found[-1], session.pos, session.cache)
            torch.cuda.set_sync_debug_mode("default")
            session.cache.room -= 1
            session._advance(1)
            session.cache.maintain(1, session.seen)
        texts.append(torch.cat(found).flatten().tolist())
    assert texts[0] == texts[1]
