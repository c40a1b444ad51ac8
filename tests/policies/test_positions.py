"""Dual Chunk Attention against its paper's positions, token by token in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import text

from nanokv import parse
from nanokv.model.rope import inverse_frequencies, unrotated


def dual_chunk_attention(q, k, v, i: int, inv, context: int):
    """Query i (D,) and keys (n,D) before their rotation: the positions of both for each pair of chunks, token by token."""
    most, local = 3 * context // 4, context // 8
    size, out, logits = most - local, torch.zeros(v.shape[1], dtype=torch.float64), []
    for j in range(i + 1):
        if i // size == j // size:
            at = i % size
        elif i // size == j // size + 1:
            at = min(i % size + size, most)
        else:
            at = most
        angle = (at - j % size) * inv.double()
        a, b = (x.double().chunk(2) for x in (q, k[j]))
        turned = torch.cat((a[0] * angle.cos() - a[1] * angle.sin(), a[1] * angle.cos() + a[0] * angle.sin()))
        assert abs(at - j % size) < context
        logits.append(turned @ torch.cat(b) / math.sqrt(len(q)))
    for p, x in zip(torch.stack(logits).softmax(0), v[: i + 1].double(), strict=True):
        out += p * x
    return out


class DualChunkCache:
    """A cache for the model's own forward pass that attends by the paper's positions."""

    owns = True

    def __init__(self, config, context: int):
        self.config, self.context, self.inv = config, context, inverse_frequencies(config)
        self.layers = [self] * config.num_hidden_layers

    def attend(self, q, k, v, pos):
        q, k = unrotated(q, pos, self.inv)[0], unrotated(k, pos, self.inv)[0]
        group, out = len(q) // len(k), torch.zeros_like(q)
        for h in range(len(q)):
            for i in range(q.shape[1]):
                out[h, i] = dual_chunk_attention(q[h, i], k[h // group], v[0, h // group], i, self.inv, self.context)
        return out[None]


@pytest.mark.parametrize(
    ("context", "chunk"), [(24, 7), *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in [(32, None), (40, 33)])]
)
def test_dual_chunk_attention_has_the_papers_positions(context, chunk, llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(12, seed=6)
    ids = torch.tensor([prompt + more])
    with torch.no_grad():
        model = llm.models.prefill
        hidden = model.hidden(ids, torch.arange(72)[None], DualChunkCache(llm.config, context))
        expected = model.logits(hidden)[0, 59:]
    plan = parse(f"dca:context={context}")
    session = llm.session(12, chunk, plan)
    found = [session.start([prompt])]
    found += [session.feed(torch.tensor([[t]])) for t in more[:8]]
    torch.testing.assert_close(torch.cat(found), expected[:9], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(session.feed(torch.tensor([more[8:]]), True)[0], expected[9:], atol=1e-4, rtol=1e-4)
    # a row of a batch, and a step of static shapes
    both, alone = (llm.session(12, chunk, plan) for _ in range(2))
    start = both.start([prompt, prompt[:13]]), alone.start([prompt[:13]])
    torch.testing.assert_close(start[0], torch.cat((expected[:1], start[1])), atol=1e-4, rtol=1e-4)
    both.cache.freeze()
    for i, t in enumerate(more):
        logits = both.feed(torch.tensor([[t], [t]]))
        right = torch.cat((expected[i + 1 : i + 2], alone.feed(torch.tensor([[t]]))))
        torch.testing.assert_close(logits, right, atol=1e-4, rtol=1e-4)


def test_dual_chunk_attention_of_a_short_text_is_attention(llm_of):
    llm, prompt = llm_of("g3"), text(60, seed=5)
    for plan in ("dca:context=96", "dca:context=512"):  # chunks of 60 tokens and more
        found, right = (llm.session(4, None, parse(p)).start([prompt]) for p in (plan, "full"))
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
