"""The tokens that the end of the prompt attends to stay, and those whose values change the output most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest, rounded
from nanokv.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class CriticalKV(SnapKV):
    """CriticalKV (Feng et al. 2025, arXiv:2502.03805): in each head a share `first` of the budget goes to the tokens of
    highest SnapKV score. The rest goes to those of highest (score + epsilon)·|W_o v|₁, where the score is the mean over
    the observation window and W_o the output projection. With heads=ada (the paper's AdaKV variant) the plain scores
    decide how many tokens a head gets.

    As in kvpress the norm is averaged over the query heads of a KV head. Where several layers read the same keys, W_o
    is that of the layer that owns them. Deviation from kvpress: the guaranteed `floor` of heads=ada is a number of
    tokens, which both stages choose, where kvpress keeps the best by the plain score.

    first    the share of the budget that the plain scores decide
    epsilon  added to each score in the second stage
    """

    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self):
        if not 0 <= self.first <= 1 or self.epsilon < 0:
            raise ValueError(
                f"critical:first={self.first},epsilon={self.epsilon} is out of range; first 0 … 1, epsilon ≥ 0"
            )
        if self.select == "chunk":
            raise ValueError("critical:select=chunk: the second stage ranks single tokens; use select=token")
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return replace(super().request, output_weights=True)

    def refine(self, p: Prompt, score: Tensor, n: int | Tensor) -> Tensor:
        n = torch.as_tensor(n, device=score.device).expand(score.shape[:2])
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        is_first = rank < (n * self.first).int()[..., None]
        by_value = rounded((score / (p.n_queries * len(p.attention)) + self.epsilon) * p.output_norms())
        return by_value.masked_fill(is_first, torch.inf).masked_fill(~p.valid, -torch.inf)
