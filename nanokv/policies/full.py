"""Keep everything."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.cache.kept import Kept, Prompt
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """The uncompressed cache that every other policy is measured against (no paper)."""

    keeps_all_or_edges = keeps_prefix = True

    def keep(self, p: Prompt) -> Kept:
        return Kept.all(p)
