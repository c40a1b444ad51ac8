"""Nothing is evicted: tokens that matter less are held at lower precision."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.policies.h2o import H2O


@dataclass(frozen=True, kw_only=True)
class MiKV(H2O):
    """MiKV (Yang et al. 2024, arXiv:2402.18096, §3): H2O's heavy hitters and recent tokens stay exact; a token that
    H2O would evict moves to the low-precision tier and never comes back.

    Deviations: see the store `mixed` for the codes.
    """

    budget: int | str = "25%"
    demote: bool = True
