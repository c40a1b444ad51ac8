"""The tokens stay that any single query of the end of the prompt attends to, weighed by what their values change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest, rounded
from nanokv.policies.scorer import Scorer

FORCED = 2.0  # the score of tokens that are taken first; all others have at most 1


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(Scorer):
    """DefensiveKV (Feng et al. 2025, arXiv:2510.13334): a token's score is the most attention that one query of the
    observation window gives it, over all query heads of the KV head, pooled over `kernel` neighbours. No score is less
    than the mean over the head, so that the worst case of a token that looks useless is not taken for zero. It is then
    multiplied with |W_o v|₁, as a share of the sum over the KV heads; with one KV head this changes nothing.

    Taken first, whatever their score, are the tokens of most attention on average, as long as they and the window hold
    less than the share `mass` of it. The heads of a layer compete without a guaranteed share; layers=compete is the paper's
    LayerDefensiveKV. Deviations from the authors' code: scores are pooled after the maximum, where theirs pools each
    query's before it and scales them back to their sum; the window's share of attention is its own, where theirs is
    that of as many tokens before it.

    window  queries of the observation window; their own tokens always stay
    kernel  neighbouring tokens over which scores are averaged; odd
    mass    the share of attention that the tokens taken first and the window stay below
    """

    window: int = 32
    kernel: int = 5
    mass: float = 0.9
    heads: str = "ada"
    floor: float = 0.0

    def __post_init__(self):
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or not 0 <= self.mass <= 1:
            raise ValueError(
                f"defensive:window={self.window},kernel={self.kernel},mass={self.mass} is out of range; window ≥ 1, "
                "kernel odd and ≥ 1, mass 0 … 1"
            )
        if self.select == "chunk":
            raise ValueError("defensive:select=chunk: some tokens are taken first, one by one; use select=token")
        if self.every:
            raise ValueError(
                f"defensive:every={self.every}: values are compared between heads, token by token, so all must be held; "
                "use every=0"
            )
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window, over_group="max", over_queries="max", output_weights=True)

    @property
    def second_request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window)

    @property
    def min_budget(self) -> int:
        return self.window

    def score(self, p: Prompt) -> Tensor:
        recent = p.recent(self.window)
        most = p.attention.amax(0, keepdim=True).masked_fill(recent, 0)
        most = avg_pool1d(most, self.kernel, stride=1, padding=self.kernel // 2).masked_fill(recent, 0)
        most = most.maximum(most.sum(-1, keepdim=True) / (~recent).sum(-1, keepdim=True).clamp(min=1))
        norms = p.output_norms()
        score = most * norms / norms.sum(1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)
        return score.masked_fill(self._taken_first(p, recent), FORCED).masked_fill(recent, torch.inf)

    def _taken_first(self, p: Prompt, recent: Tensor) -> Tensor:
        """bool (1,Hkv,N): the tokens before the window that hold most of the attention, on average over its queries."""
        mean = p.second_attention.sum(0, keepdim=True)
        share = rounded(mean / mean.sum(-1, keepdim=True)).double()
        of_window = (share * recent).sum(-1, keepdim=True)
        share, order = share.masked_fill(recent, -1).sort(dim=-1, descending=True, stable=True)
        is_first = of_window + share.clamp(min=0).cumsum(-1) < self.mass
        is_first &= torch.arange(len(p), device=share.device) < self.layer_budget(p) - self.window
        return torch.zeros_like(recent).scatter(2, order, is_first)
