"""Uniform codes of 8, 4 or 2 bits: keys per channel over groups of tokens, values per token over groups of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Context, StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.dense import BOOKKEEPING
from nanokv.stores.quant.grouped import GroupedStore


@dataclass(frozen=True, kw_only=True)
class Int(StoreSpec):
    """KIVI (Liu et al. 2024, arXiv:2402.02750, §4): a few channels of K are large for all tokens, so K is rounded per channel over `group`
    tokens, V per token over `group` channels; scale and zero are fp16. The last tokens stay exact until a group of them is complete.

    pin: the first so many tokens held stay exact for ever (IntactKV, arXiv:2403.01241), and so do sinks a policy never lets go.
    kivi4 and kivi2 are the paper's group of 32 with the 32 last tokens exact; int8, int4 and int2 take groups of 64 (V: of the
    largest part of that which divides a head). Deviations from the authors' code: at least `residual` tokens are exact at all
    times, at most residual + group − 1, where their K drops to none after each flush and their V slides by single tokens; a group
    without a range divides nothing by zero; KV heads are rounded before they are repeated for their query heads.
    """

    k: int = 4
    v: int = 4
    group: int = 64
    residual: int = 64
    pin: int = 0

    def __post_init__(self):
        if self.k not in (2, 4, 8) or self.v not in (2, 4, 8):
            raise ValueError(f"k={self.k},v={self.v}; bits are 2, 4 or 8")
        if self.group < 2 or self.residual < 0 or self.pin < 0:
            raise ValueError(f"group={self.group},residual={self.residual},pin={self.pin}; group ≥ 2, the others ≥ 0")

    @property
    def granule(self) -> int:
        return self.group

    def channels(self, dim: int) -> int:
        """How many channels of V share a scale."""
        return math.gcd(self.group, dim)

    def misfit(self, config: Any) -> str:
        return (
            ""
            if config.head_dim % 4 == 0
            else f"four codes share a word, and {config.head_dim} channels are no fours; use fp8"
        )

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        dim, heads = config.head_dim, config.num_key_value_heads
        token = dim * (self.k + self.v) / 8 + 4 * dim / self.group + 4 * dim / self.channels(dim) + 4
        exact = 2 * dim * dtype.itemsize + 4
        near = (
            max(self.pin, sink) + self.residual + self.group
        ) * exact + self.group * token  # a ring takes a group more
        return heads * token, int(heads * (near + BOOKKEEPING + 2 * 4))

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> GroupedStore:
        return GroupedStore(rows, policy, room, ctx, self)
