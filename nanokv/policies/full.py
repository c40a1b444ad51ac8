"""Keep everything."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.contract import Kept, Policy, Prompt


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """The uncompressed cache that every other policy is measured against (no paper)."""

    whole = True

    def keep(self, p: Prompt) -> Kept:
        return Kept.all(p)
