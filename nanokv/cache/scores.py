"""Which attention statistics a policy asks for, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.backends.base import Ops


@dataclass(frozen=True)
class Ask:
    """Attention statistics a policy wants, as data; `ops.mass` serves them all.

    rows: how many of the last prompt queries vote; 0 nobody, None all. group: how the G query heads of a KV head vote
    together: mean | max. stat: what a key gets from them: sum, the attention received; low, by how many queries it was given less
    than an even share; hit, one more than the position of the last query that gave it at least an even share.
    noise: votes of the logits plus Gumbel noise under this seed, divided by tau. moments: also mean and covariance of the queries
    before rotation, the first so many of the text left out.
    """

    rows: int | None = 0
    group: str = "mean"
    stat: str = "sum"
    noise: int | None = None
    tau: float = 1.0
    moments: int | None = None

    def noises(self, head: int) -> tuple[int, float, int] | None:
        """As `ops` take it, where the first query head is this one."""
        return None if self.noise is None else (self.noise, self.tau, head)

    @property
    def tail(self) -> int:
        """How many of the last queries must be at hand to answer once more while decoding."""
        return self.rows or (0 if self.moments is None else 128)


def score_queries(ask: Ask, q: Tensor, k: Tensor, start: int, window: int | None, ops: Ops) -> Tensor:
    return ops.mass(q, k, start, window, ask.group, ask.stat, ask.noises(0))


def moments(sums: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Σq, Σqqᵀ and their count, per reader → mean (readers,H,D) and covariance (readers,H,D,D)."""
    mean = torch.cat([q / n for q, _, n in sums])
    return mean, torch.cat([qq / n for _, qq, n in sums]) - mean[..., None] * mean[..., None, :]
