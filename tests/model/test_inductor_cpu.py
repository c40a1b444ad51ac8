"""The products that are written for Inductor, run as plain torch, against matrix products in fp64."""

import pytest
import torch

from nanokv.backends import inductor_cpu


def near(found, x, y) -> bool:
    return torch.allclose(found.double(), x.double() @ y.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 17, 18, 19, 26, 100])  # pieces are made from 18 on
@pytest.mark.parametrize(("n", "channels"), [(1, 1), (3, 20), (3, 64), (17, 64)])  # whole, in tiles, and too many sums
def test_attention_is_two_matrix_products(tokens, n, channels):
    g = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(2, 2, n, channels, generator=g), torch.rand(2, 2, n, tokens, generator=g)
    y = torch.randn(2, 2, tokens + 3, channels, generator=g)[:, :, :tokens]  # a part of more capacity
    assert near(inductor_cpu.dots(x, y), x, y.mT)
    assert near(inductor_cpu.mix(weight, y), weight, y)


@pytest.mark.parametrize("tokens", [64, 65, 100])  # pieces of 7 tokens, and of one and three
def test_a_long_text_is_summed_in_more_pieces(tokens, monkeypatch):
    monkeypatch.setattr(inductor_cpu, "LONGEST_SUM", 8)
    g = torch.Generator().manual_seed(tokens)
    weight, y = torch.rand(1, 2, 3, tokens, generator=g), torch.randn(1, 2, tokens, 64, generator=g)
    assert near(inductor_cpu.mix(weight, y), weight, y)


@pytest.mark.parametrize("channels", [3, 64, 150])  # one sum, one, and three
def test_a_row_times_weights(channels, monkeypatch):
    monkeypatch.setattr(inductor_cpu, "LONGEST_SUM", 64)
    g = torch.Generator().manual_seed(channels)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((1, 1, channels), (10, channels), (10,)))
    assert near(inductor_cpu.linear(x, weight, bias) - bias, x, weight.T)
    assert near(inductor_cpu.linear(x, weight, None), x, weight.T)
