"""Decode is static shapes and in place: every plan compiles without a graph break and without recompiling as it goes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from conftest import text
from test_identity import SMALL, STEPS, run

from nanokv import parse

# the last, most entangled one of each policy
KINDS = [plans[-1] for name, plans in SMALL.items() if name not in ("pyramidkv", "chunkkv")]


@pytest.mark.parametrize(
    "plan", [*KINDS, "adakv:budget=20,window=4,kernel=3", "streaming:sink=2,recent=10,positions=cache"]
)
def test_a_step_is_one_graph_and_stays_one(plan, llm_of):
    llm, more = llm_of("g3"), text(STEPS, seed=6)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(llm.models.decode.forward, backend=counter, fullgraph=True, dynamic=False)
    logits, _ = run(llm, plan, [text(60, seed=5)], [more])
    for _ in range(2):  # a fresh cache of the same shape needs no new graph
        session = llm.session(STEPS, None, parse(plan))
        session.start([text(60, seed=5)])
        wait = session.plans[0].keep.wait
        for t in range(STEPS):
            if t < wait:
                session.feed(torch.tensor([[more[t]]]))
                continue
            if t == wait:
                session.cache.freeze()
            with torch.inference_mode():
                out = step(torch.tensor([[more[t]]]), session.pos.clone(), session.cache)
                session._advance(1)
                session.cache.room -= 1
                session.cache.maintain(1, session.seen)
            torch.testing.assert_close(out[0], logits[0, t + 1], atol=1e-4, rtol=1e-4)
    # where a policy looks again and heads come out longer, slots lie elsewhere: a graph each time, of which there are two or three here
    again = (parse(plan).keep.every and parse(plan).store == parse("full+ragged").store) or plan.startswith("corm")
    assert counter.frame_count <= 4 if again else counter.frame_count == 1


def test_blocks_compile_once_for_caches_of_three_lengths(llm_of):
    """Blocks, not the step: what a runner substitutes. The first length makes a static graph, the second a symbolic one."""
    llm = llm_of("g3")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    block = torch.compile(type(llm.models.decode.layers[0]).forward, backend=counter, fullgraph=True)
    counts = []
    for n in (60, 41, 77):
        session = llm.session(6, None, parse("snapkv:budget=50%,window=4"))
        session.start([text(n, seed=5)])
        session.cache.freeze()
        for t in range(4):
            with torch.inference_mode():
                llm.models.decode(torch.tensor([[t]]), session.pos + t, session.cache, run=block)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[-2] <= 2
