"""Budgets: tokens, percent and bytes as numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """What a plan meets: enough to turn percents, bytes and family thresholds into plain numbers."""

    family: str  # llama2 | llama3 | mistral | qwen2 | smollm2 | "" (not known)
    owners: int  # layers that own storage
    prompt_len: int
    room: int  # tokens that will be generated or fed later
    rows: int  # rows that share a budget in bytes
    token_bytes: float  # one token in one owning layer, all KV heads, as the store lays it out
    fixed_bytes: int  # per row and owning layer, whatever its length
    pads: bool = False  # whether all heads take the slots of the longest

    def tokens(self, budget: int | str, least: int, most_new: int | None = None) -> int:
        """A budget as a number of kept prompt tokens per KV head.

        "25%" is of this prompt, never under `least`; "64MiB" is of the whole cache, with the slots of at most `most_new` generated
        tokens (none: all of them).
        """
        room = self.room if most_new is None else min(self.room, most_new)
        if isinstance(budget, int):
            return budget
        if budget.endswith("%"):
            return max(least, int(self.prompt_len * float(budget[:-1]) / 100))
        share = size(budget) / self.rows / self.owners - self.fixed_bytes
        n = int(share / self.token_bytes) - room
        if n < least:
            need = (least + room) * self.token_bytes + self.fixed_bytes
            raise ValueError(
                f"a budget of {budget} leaves {max(n, 0)} prompt tokens per head beside {room} new ones; this policy "
                f"keeps at least {least}: give {int(need * self.owners * self.rows / 2**20) + 1}MiB or more, or generate less"
            )
        return n


UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """'256MiB' → bytes."""
    for unit, scale in UNITS.items():
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * scale)
    raise ValueError(f"{text!r} is no size; a number with one of {', '.join(UNITS)}, such as 256MiB")


def check_budget(budget: int | str, least: int, why: str) -> None:
    """Raise ValueError unless budget is tokens ≥ least, a percent in (0, 100], or a size."""
    try:
        ok = budget >= least if isinstance(budget, int) else _positive(budget)
    except (ValueError, OverflowError):
        raise ValueError(f"budget={budget} is no budget; give tokens (512), percent (25%) or bytes (256MiB)") from None
    if not ok:
        raise ValueError(
            f"budget={budget} is too small or out of range: {why}; give at least {least} tokens, 1% … 100%, or a size"
        )


def _positive(budget: str) -> bool:
    if budget.endswith("%"):
        return 0 < float(budget[:-1]) <= 100
    return size(budget) > 0
