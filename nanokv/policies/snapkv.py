"""The tokens that the end of the prompt attends to stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class SnapKV(Scorer):
    """SnapKV (Li et al. 2024, arXiv:2404.14469, §4): the prompt's last `window` queries are the observation window.
    Each token's attention scores from these queries are summed and then pooled over `kernel` neighbouring tokens. In
    each head the `budget − window` tokens of highest score stay, and the observation window itself.

    Defaults are the paper's LongBench setting; the released code's own are budget=2048,window=32,kernel=5,pool=avg.
    Deviations from the authors' code: one choice per KV head, by the scores of its query heads joined by `group`
    before pooling, where theirs expands the cache to query heads and so stores G times more; scores are fp32; kept
    tokens stay in temporal order, and ties go to the earlier token; a prompt no longer than the budget keeps
    everything.

    window  queries of the observation window; their own tokens always stay
    kernel  neighbouring tokens over which scores are pooled; odd
    pool    max or avg
    group   mean or max: how the scores of the query heads of a KV head are joined
    """

    window: int = 32
    kernel: int = 7
    pool: str = "max"  # max | avg
    group: str = "mean"  # mean | max

    def __post_init__(self):
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"snapkv:window={self.window},kernel={self.kernel} is out of range; window ≥ 1, kernel odd and ≥ 1"
            )
        if self.pool not in ("max", "avg") or self.group not in ("mean", "max"):
            raise ValueError(f"snapkv:pool={self.pool},group={self.group}: pool is max or avg, group is mean or max")
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window, over_group=self.group)

    @property
    def min_budget(self) -> int:
        return self.window

    def score(self, p: Prompt) -> Tensor:
        recent = p.recent(self.window)
        # p.attention has one plane per layer that reads these keys; in the pooling the window's own tokens count as 0
        attention = p.attention.sum(0, keepdim=True).masked_fill(recent, 0)
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d  # avg_pool1d pads with zeros, as the authors do
        return pool(attention, self.kernel, stride=1, padding=self.kernel // 2).masked_fill(recent, torch.inf)
