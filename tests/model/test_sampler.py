"""Sampling against frequencies and against the filters written as loops."""

from __future__ import annotations

import pytest
import torch

from nanokv.text.sampler import Sampling, probabilities, sample

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])


def loop(logits: list[float], s: Sampling) -> list[float]:
    weight = [2.718281828459045 ** (x / s.temperature) for x in logits]
    p = [w / sum(weight) for w in weight]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    keep = set(order[: s.top_k or len(p)])
    kept = sum(p[i] for i in keep)
    mass, nucleus = 0.0, set()
    for i in [i for i in order if i in keep]:
        if mass >= s.top_p * kept:
            break
        nucleus.add(i)
        mass += p[i]
    p = [x if i in nucleus and x >= s.min_p * max(p) else 0.0 for i, x in enumerate(p)]
    return [x / sum(p) for x in p]


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=3),
    Sampling(temperature=1.3, top_p=0.7),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=2.0, top_k=5, top_p=0.9, min_p=0.1),
    Sampling(temperature=1.0, top_p=0.01),
]


@pytest.mark.parametrize("s", SETTINGS)
def test_filters_are_those_of_the_loop(s):
    torch.testing.assert_close(
        probabilities(LOGITS, s)[0], torch.tensor(loop(LOGITS[0].tolist(), s)), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("s", SETTINGS)
def test_draws_follow_the_probabilities(s):
    dice, n = torch.Generator().manual_seed(0), 20000
    counts = torch.bincount(sample(LOGITS.expand(n, -1), s, dice), minlength=6) / n
    torch.testing.assert_close(counts, probabilities(LOGITS, s)[0], atol=0.015, rtol=0)


def test_greedy_takes_the_largest_and_a_seed_repeats_itself():
    assert sample(LOGITS, Sampling(), None).item() == 0
    s = Sampling(temperature=1.0)
    draws = [sample(LOGITS.expand(50, -1), s, torch.Generator().manual_seed(k)).tolist() for k in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1}, {"temperature": float("nan")}],
)
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="give"):
        Sampling(**bad)
