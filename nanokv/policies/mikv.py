"""Nothing is dropped: what matters less is held more coarsely."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.policies.h2o import H2O


@dataclass(frozen=True, kw_only=True)
class MiKV(H2O):
    """MiKV (Yang et al. 2024, arXiv:2402.18096, §3): H2O's heavy hitters and recent tokens stay as they are; a token that H2O would drop
    goes to few bits instead, and never comes back.

    Deviations: see store mixed for the codes.
    """

    budget: int | str = "25%"
    demote: bool = True
