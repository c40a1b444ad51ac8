"""Choose the next token from logits.

Temperature 0 is greedy. Otherwise temperature, top-k, top-p and min-p apply in this order.

The token is the argmax of p / e with e from the exponential distribution. This has the same distribution as a
multinomial draw and does not wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; the defaults are greedy. ValueError if one is out of range."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top-k is {self.top_k}; give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}; give a number above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min-p is {self.min_p}; give a number from 0 and below 1")


def probabilities(logits: Tensor, s: Sampling) -> Tensor:
    """Logits (B,vocab) → fp32 probabilities (B,vocab) after the filters; greedy: 1 for the likeliest token."""
    if s.temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, likeliest(logits)[..., None], 1.0)
    p = ((logits.float() - logits.float().amax(-1, keepdim=True)) / s.temperature).softmax(-1)
    if s.top_k:
        kth = p.topk(min(s.top_k, p.shape[-1]), -1).values[:, -1:]
        p = p.masked_fill(p < kth, 0)
    if s.top_p < 1:
        order = p.sort(-1, descending=True)
        before = order.values.cumsum(-1) - order.values  # sum of the likelier tokens; the one that crosses top_p stays
        drop = torch.zeros_like(p, dtype=torch.bool).scatter(
            -1, order.indices, before >= s.top_p * p.sum(-1, keepdim=True)
        )
        p = p.masked_fill(drop, 0)
    if s.min_p > 0:
        p = p.masked_fill(p < s.min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True)


NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity), so there is no next token; the weights may be damaged, or their "
    "type may be too narrow: try --dtype float32"
)


def finite_rows(logits: Tensor) -> Tensor:
    """Logits (B,vocab) → bool (B,): no logit of the row is NaN or infinite. A sum is the cheapest look at all of them."""
    return logits.sum(-1, dtype=torch.float32).isfinite()


def finite(logits: Tensor) -> Tensor:
    """Return the logits. ValueError if one is NaN or infinite: no statistic may come of them."""
    if not finite_rows(logits).all():
        raise ValueError(NOT_FINITE)
    return logits


def sample(logits: Tensor, s: Sampling, generator: torch.Generator | None) -> Tensor:
    """Logits (B,vocab) → token ids (B,)."""
    return likeliest(logits) if s.temperature == 0 else draw(probabilities(logits, s), generator)


def likeliest(logits: Tensor) -> Tensor:
    """Logits (…,vocab) → the token of the largest one (…); of equal ones the first. On a CPU argmax of 16 bits takes five to
    eight times as long.
    """
    return logits.max(-1).indices


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index from each row of weights (B,n), which need not sum to 1 → (B,)."""
    exponential = torch.empty_like(weights).exponential_(1.0, generator=generator)
    return (weights / exponential).argmax(-1)
