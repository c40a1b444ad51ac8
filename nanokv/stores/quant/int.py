"""Uniform codes of 8, 4 or 2 bits: keys per channel over groups of tokens, values per token over groups of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.dense import SLOT_COUNTERS
from nanokv.stores.quant.grouped import GroupedStore, GroupState, Planes


@dataclass(frozen=True, kw_only=True)
class Int(StoreSpec):
    """KIVI (Liu et al. 2024, arXiv:2402.02750, §4): a few channels of K are large for all tokens, so K is rounded per
    channel over `group` tokens, and V per token over `group` channels; scale and zero point are fp16. The most recent
    tokens stay exact: whenever their window holds residual + group tokens, the oldest `group` of them are rounded.

    kivi4 and kivi2 are the paper's groups of 32 with 32 exact tokens; int8, int4 and int2 take groups
    of 64 (of V: the largest part of 64 that divides a head). Deviations from the authors' code: between
    steps the last `residual` to residual + group − 1 tokens are exact, where their K drops to none after each flush and
    their V slides by single tokens; a group without a range divides nothing by zero; KV heads are rounded before they
    are repeated for their query heads.

    k         bits of K: 8, 4 or 2
    v         bits of V
    group     tokens of K, and channels of V, that share a scale
    residual  last tokens that stay exact, at least
    pin       first tokens that stay exact (IntactKV, arXiv:2403.01241), as sinks do that a policy never evicts
    """

    k: int = 4
    v: int = 4
    group: int = 64
    residual: int = 64
    pin: int = 0
    state_type = GroupState
    kernels = ("decode_quant", "quantize")

    def __post_init__(self):
        if self.k not in (2, 4, 8) or self.v not in (2, 4, 8):
            raise ValueError(f"k={self.k},v={self.v}; bits are 2, 4 or 8")
        if self.group < 2 or self.residual < 0 or self.pin < 0:
            raise ValueError(f"group={self.group},residual={self.residual},pin={self.pin}; group ≥ 2, the others ≥ 0")

    @property
    def eviction_granularity(self) -> int:
        return self.group

    def v_group(self, dim: int) -> int:
        """How many channels of V share a scale."""
        return math.gcd(self.group, dim)

    def incompatible_model(self, config: Any) -> str:
        dim = config.head_dim
        if dim % 4:
            return f"four codes share a word, and 4 does not divide this model's head dimension {dim}; use fp8"
        if self.v_group(dim) == 1:
            return f"no part of group={self.group} divides this model's head dimension {dim}; give a group of 32 or 64"
        return ""

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        dim, heads = config.head_dim, config.num_key_value_heads
        token = self.grouped_token_bytes(dim, dtype) + 4
        exact = 2 * dim * dtype.itemsize + 4
        window = max(self.pin, sink) + self.residual + self.group
        fixed = window * exact + self.group * token  # a ring needs one group more than its tokens
        return heads * token, int(heads * (fixed + SLOT_COUNTERS + 4 * 4 + 2 * 8))

    def grouped_token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        """Bytes of one token's K and V in a group."""
        return dim * (self.k + self.v) / 8 + 4 * dim / self.group + 4 * dim / self.v_group(dim)

    def encode(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[Planes, Planes]:
        """K and V (…,group,D) → words (…,group,·), scale and zero point. These two are (…,1,D) for K and, for V,
        (…,group,m) for its m groups of channels.
        """
        quantize = ctx.ops.quantize
        return quantize(k, self.k, self.group, 1), quantize(v, self.v, 1, self.v_group(k.shape[-1]))

    def check_codes(self, k: Planes, v: Planes) -> None:
        """ValueError unless these planes, from a file and of the right shapes, can be codes."""

    def decode(self, ops: Any, k: Planes, v: Planes) -> tuple[Tensor, Tensor]:
        """The planes of K and of V → fp32 (…,group,D)."""
        return ops.dequantize(*k, self.k), ops.dequantize(*v, self.v)

    def attend(
        self,
        ops: Any,
        q: Tensor,
        k: Planes,
        v: Planes,
        length: Tensor | None,
        key_pos: Tensor,
        query_pos: Tensor,
        sliding_window: int | None,
        exact: tuple[Tensor, Tensor, Tensor | None, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over groups (B,Hkv,groups,…) and, if given, over exact tokens: (keys, values, length, positions).
        The rest is as `decode_quant` has it in kernels/reference.py.
        """
        k, v = ([x.flatten(2, 3) for x in planes] for planes in (k, v))
        return ops.decode_quant(q, k, v, length, key_pos, query_pos, sliding_window, (self.k, self.v), exact)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> GroupedStore:
        return GroupedStore(rows, policy, room, ctx, self)
