"""What the end of the prompt looks at is what stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import Ask
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class SnapKV(Scorer):
    """SnapKV (Li et al. 2024, arXiv:2404.14469, §4): the last `window` queries vote, votes are pooled over `kernel`
    neighbouring tokens, the best `budget − window` tokens of each head stay, and the window itself.

    Defaults are the paper's LongBench setting; the released code's own are budget=2048,window=32,kernel=5,pool=avg.
    Deviations from the authors' code: one choice per KV head (votes of its query heads joined by `group` before pooling), where
    theirs expands the cache to query heads and so stores G times more; votes stay fp32; survivors stay in temporal order, ties go
    to the earlier token; a prompt as long as the budget is left alone.
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
    def ask(self) -> Ask:
        return Ask(rows=self.window, group=self.group)

    @property
    def least(self) -> int:
        return self.window

    def score(self, p: Prompt) -> Tensor:
        recent = p.last(self.window)
        votes = p.votes.sum(0, keepdim=True).masked_fill(recent, 0)  # the window's own columns are not pooled
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d  # avg counts zeros beyond the edge, as theirs does
        return pool(votes, self.kernel, stride=1, padding=self.kernel // 2).masked_fill(recent, torch.inf)
