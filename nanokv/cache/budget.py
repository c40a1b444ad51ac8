"""Budgets: a number of tokens, a percentage of the prompt or a size in bytes, as a number of kept tokens."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Workload:
    """What a plan is fitted to: enough to turn percentages, bytes and per-family thresholds into plain numbers."""

    family: str  # llama2 | llama3 | mistral | qwen2 | smollm2 | "" (not known)
    owners: int  # layers that own storage
    prompt_len: int
    room: int  # tokens that will be generated or fed later
    rows: int  # rows that share a budget in bytes
    token_bytes: float  # bytes of one token in one owning layer, all KV heads, as the store holds it
    fixed_bytes: int  # bytes per row and owning layer, whatever the length
    pads_heads: bool = False  # whether all heads take the slots of the longest one
    context: int = 0  # the model's context, in tokens
    has_windows: bool = False  # whether some layer has a sliding window

    def tokens(self, budget: int | str, least: int, new_slots: int | None = None) -> int:
        """A budget as a number of kept prompt tokens per KV head.

        "25%" is of this prompt and never under `least`. "64MiB" is of the whole cache, which also has slots for the
        generated tokens: for at most `new_slots` of them, or for all if that is None. ValueError if the bytes do not
        hold `least` tokens.
        """
        if isinstance(budget, int):
            return budget
        if budget.endswith("%"):
            return max(least, int(self.prompt_len * float(budget[:-1]) / 100))
        room = self.room if new_slots is None else min(self.room, new_slots)
        per_layer = size(budget) / self.rows / self.owners - self.fixed_bytes
        n = int(per_layer / self.token_bytes) - room
        if n < least:
            need = (least + room) * self.token_bytes + self.fixed_bytes
            raise ValueError(
                f"a budget of {budget} leaves {max(n, 0)} prompt tokens per head beside {room} new ones; this policy "
                f"keeps at least {least}: give {int(need * self.owners * self.rows / 2**20) + 1}MiB or more, or generate less"
            )
        return n


def size(text: str) -> int:
    """'256MiB' → bytes. ValueError if it is no size."""
    for unit, scale in UNITS.items():
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * scale)
    raise ValueError(f"{text!r} is no size; give a number with one of {', '.join(UNITS)}, such as 256MiB")


def check_budget(budget: int | str, least: int, reason: str) -> None:
    """Raise ValueError unless budget is tokens ≥ least, a percentage in (0, 100], or a size."""
    try:
        ok = budget >= least if isinstance(budget, int) else _positive(budget)
    except (ValueError, OverflowError):
        raise ValueError(f"budget={budget} is no budget; give tokens (512), percent (25%) or bytes (256MiB)") from None
    if not ok:
        raise ValueError(
            f"budget={budget} is too small or out of range: {reason}; give at least {least} tokens, a percentage up to 100%, or a size"
        )


def in_bytes(budget: int | str | None) -> bool:
    """Whether a budget is a size, not tokens or a percentage."""
    return isinstance(budget, str) and not budget.endswith("%")


def _positive(budget: str) -> bool:
    if budget.endswith("%"):
        return 0 < float(budget[:-1]) <= 100
    return size(budget) > 0
