"""Gates that need no GPU: what a step asks of one, counted over meta tensors (see evals/launches.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import PLANS, every, of, pairs, shape

from evals import launches
from kernels import reference
from nanokv import parse
from nanokv.backends.torch_cpu import SDPA
from nanokv.backends.torch_cuda import TORCH_CUDA
from nanokv.backends.triton import triton_ops
from nanokv.stores.dense import SlotStore

META = torch.device("meta")
CONFIG = replace(shape(heads=8), head_dim=64, hidden_size=64, intermediate_size=64)
# launches per layer with our kernels
CEILINGS = {
    "full": 14,
    "streaming:sink=2,recent=10": 14,
    "snapkv:budget=20,window=4,kernel=3": 14,
    "adakv:budget=20,window=4,kernel=3": 14,
    "h2o:budget=20": 26,
    "tova:budget=20": 20,
    "full+fp8": 22,
    "full+int4:group=32,residual=8": 16,
    "snapkv:budget=20,window=4,kernel=3+int4:group=32,residual=8": 16,
}


def counted(plan, ops, **how) -> launches.Counted:
    plan = parse(plan) if isinstance(plan, str) else plan
    found, _ = launches.step(launches.models_of(ops, CONFIG), plan, **how)
    return found


def runs_on_kernels(plan: str) -> bool:
    """Whether the step after the prompt is one of our kernels': keyformer's noise is torch's, and some decide later."""
    policy = parse(plan).policy
    return not policy.decide_after and "keyformer" not in plan


@pytest.mark.parametrize("plan", [*CEILINGS, *every(4, [p for p in PLANS if p not in CEILINGS and runs_on_kernels(p)])])
def test_a_step_with_kernels_waits_for_nothing_and_copies_no_keys(plan):
    found = counted(plan, triton_ops(META))
    assert found.largest < keys_of_a_layer() / 4, found.in_blocks
    assert (
        found.in_blocks["triton decode_split"] + found.in_blocks["triton decode_quant_split"]
        >= CONFIG.num_hidden_layers
    )
    if plan in CEILINGS:
        assert found.in_blocks.total() <= CEILINGS[plan] * CONFIG.num_hidden_layers, found.in_blocks


@pytest.mark.parametrize("store", every(2, [store for keep, store in pairs() if keep == "full"]))
def test_a_step_over_any_store_waits_for_nothing(store):
    plan = of("mikv" if store == "mixed" else "full", store)
    assert counted(plan, triton_ops(META)).in_blocks["triton rotate"] == CONFIG.num_hidden_layers


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("plan", ["full", "streaming:sink=2,recent=10", "snapkv:budget=20,window=4,kernel=3"])
def test_a_step_of_plain_torch_waits_for_nothing_and_copies_no_keys(plan, frozen):
    found = counted(plan, TORCH_CUDA, frozen=frozen)
    assert found.largest < keys_of_a_layer() / 4, found.in_blocks
    assert found.in_blocks["_scaled_dot_product_efficient_attention"] >= CONFIG.num_hidden_layers
    assert found.in_blocks.total() <= (51 if frozen else 40) * CONFIG.num_hidden_layers, found.in_blocks


def test_ranges_of_keys_cost_no_launches_each(monkeypatch):
    monkeypatch.setattr("nanokv.backends.torch_cuda.MIN_RANGE", 16)  # 25 ranges, and what is left over
    assert counted("full", TORCH_CUDA).in_blocks.total() <= 66 * CONFIG.num_hidden_layers


def keys_of_a_layer() -> int:
    """Bytes of the keys that a layer holds of a whole prompt."""
    return launches.PROMPT * CONFIG.num_key_value_heads * CONFIG.head_dim * 2


def test_a_turn_takes_a_fused_kernel():
    found = counted("full", TORCH_CUDA, frozen=False, tokens=5).in_blocks
    assert found["_scaled_dot_product_flash_attention"] == CONFIG.num_hidden_layers and not found["bmm"], found


@pytest.mark.parametrize("window", [None, 40])
def test_a_chunk_of_a_prompt_takes_a_fused_kernel(window):
    q, k = (torch.empty(1, heads, n, 64, dtype=torch.bfloat16, device=META) for heads, n in ((8, 30), (2, 90)))
    for ops, fused in ((TORCH_CUDA, True), (SDPA, False)):
        with launches.counting() as count:
            ops.prefill(q, k, k, 60, window)
        names = " ".join(count.found.outside)
        assert ("flash_attention" in names or "efficient_attention" in names) == fused
        assert ("bmm" in names) != fused


# ---- the gates can fail ----


def test_keys_that_are_cast_are_seen():
    found = counted("full", replace(TORCH_CUDA, decode=reference.decode))
    assert found.largest > keys_of_a_layer()


def test_a_wait_for_the_host_is_seen(monkeypatch):
    append = SlotStore.append

    def waits(self, k, v, pos):
        if k.device.type == "meta":
            int(self.slots.cursor.max())
        append(self, k, v, pos)

    monkeypatch.setattr(SlotStore, "append", waits)
    with pytest.raises(RuntimeError, match="meta"):
        counted("full", triton_ops(META))


def test_one_launch_more_is_seen():
    ops = triton_ops(META)
    found = counted("full", replace(ops, swiglu=lambda x: ops.swiglu(x) + 1)).in_blocks
    assert found.total() > CEILINGS["full"] * CONFIG.num_hidden_layers
