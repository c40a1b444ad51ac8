"""Every policy and every store on a GPU: plain torch against the CPU in fp32, kernels in 16 bits against the same, and
a captured step against plain calls.
"""

from __future__ import annotations

import pytest
import tiny as shapes
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from dataclasses import replace
from functools import cache

from helpers import PLANS
from tiny import text

from nanokv import load, parse
from nanokv.cache.plan import Plan
from nanokv.engine import Session
from nanokv.runner import Eager, Graphed
from nanokv.stores import EXAMPLES as STORES

pytestmark = pytest.mark.gpu
SNAPKV = "snapkv:budget=24,window=4,kernel=3"
BY_STORE = [
    f"{policy}+{store}"
    for name, store in STORES.items()
    for policy in ("full", SNAPKV, "streaming:sink=2,recent=14")
    if name != "mixed" and (policy == "full" or name not in ("shadow", "quest", "minicache"))
]
OTHERS = ["dca:context=32", "mikv:budget=20,recent=0.3", "zipcache:every=5", "qaq:epsilon=0.1,window=4,every=5"]
OTHERS += ["full+offload", f"{SNAPKV}+offload", "full+kcache:n=40", f"{SNAPKV}+kcache:n=40"]
PLANS_HERE = [*dict.fromkeys((*PLANS, *BY_STORE, *OTHERS))]
PIECES = 1, 1, 1, 5, *[1] * 14  # tokens that come at once
SHAPE = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 96}


@pytest.fixture(scope="module")
def llms(tiny):
    """One model, loaded by (device, backend, type)."""
    shapes.VARIANTS["d64"] = "Llama", SHAPE
    try:
        path = str(tiny("d64")[0])
    finally:
        del shapes.VARIANTS["d64"]

    @cache
    def find(device: str, backend: str, dtype: str):
        return load(path, dtype=dtype, device=device, backend=backend)

    return find


def logits(llm, plan: Plan, runner=None) -> torch.Tensor:
    """(2, tokens, vocab) fp32 of two rows, teacher-forced."""
    models = replace(llm.models, runner=runner or Eager(llm.models.decode))
    session = Session(models, plan, sum(PIECES))
    found, a = [session.start([text(52, seed=1), text(37, seed=2)])], 0
    more = torch.tensor([text(sum(PIECES), seed=i) for i in (3, 4)], device=llm.device)
    for n in PIECES:
        found.append(session.feed(more[:, a : a + n]))
        a += n
    return torch.stack(found, 1).float().cpu()


def off(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How far the logits (rows, tokens, vocab) of each token are off, as a share of their norm."""
    return (found - right).norm(dim=-1) / right.norm(dim=-1)


def assert_a_graph_agrees(llm, plan: Plan, plain: torch.Tensor) -> None:
    """A graph's slots are cut into other ranges than those of plain calls, so sums are ordered otherwise."""
    found = off(logits(llm, plan, Graphed(Eager(llm.models.decode), if_possible=True)), plain)
    assert found.median() < 0.01, found


@pytest.mark.parametrize("plan", PLANS_HERE)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_plain_torch_gives_the_logits_of_the_cpu(plan, backend, llms):
    """Where a store rounds, a number may fall to the neighbouring code, because sums are ordered otherwise."""
    parsed, llm = parse(plan), llms("cuda", backend, "float32")
    plain = logits(llm, parsed)
    found = off(plain, logits(llms("cpu", "eager", "float32"), parsed))
    print(f"{backend} {plan}: off by {found.median():.2g} (median), {found.max():.2g} at most")
    assert found.median() < 0.005 if any(f"+{name}" in plan for name in STORES) else found.max() < 1e-3, found
    assert_a_graph_agrees(llm, parsed, plain)


@pytest.mark.parametrize("plan", PLANS_HERE)
def test_kernels_are_no_further_from_fp32_than_plain_torch_in_16_bits(plan, llms):
    """Rounding to 16 bits may make a policy choose another token, which changes the logits that follow."""
    parsed, llm = parse(plan), llms("cuda", "triton", "float16")
    right, half = (logits(llms("cpu", "eager", dtype), parsed) for dtype in ("float32", "float16"))
    plain = logits(llm, parsed)
    found, allowed = off(plain, right), off(half, right)
    print(f"kernels {plan}: off by {found.median():.2g} (median), {found.max():.2g} at most")
    assert found.median() < 1.5 * allowed.median() + 0.01, (found, allowed)
    assert_a_graph_agrees(llm, parsed, plain)
