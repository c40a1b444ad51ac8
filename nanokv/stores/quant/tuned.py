"""The int store with bits that differ by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.protocol import Store, StoreSpec
from nanokv.policies.base import Policy
from nanokv.stores.quant.grouped import GroupState
from nanokv.stores.quant.int import Int

BITS = 2, 4, 8
# what rounding to so many bits costs, as a share of what 2 bits cost: the square of the error, which is a step of the scale
SHARE = [(3 / (2**bits - 1)) ** 2 for bits in BITS]
UNIFORM = (2, 2), (4, 2), (4, 4), (8, 4), (8, 8)  # bits of K and V, where nothing has been measured


@dataclass(frozen=True, kw_only=True)
class Tuned(StoreSpec):
    """KVTuner (Li et al. 2025, arXiv:2502.04420): K and V of each layer get the bits that they need, so that the numbers of
    the cache have `bits` bits on average. Tokens are rounded and held as in store int.

    What rounding costs is measured once for a model: a text is read with K or V of a single layer rounded to 2 bits, and
    the cost is the divergence of the model's next-token distribution (KL) from that without rounding. It is taken to
    fall with the square of the rounding error. From 2 bits each, the bits then go where one more bit saves most.
    Deviations: the paper searches for whole assignments by the accuracy on a task, after it has grouped the layers by the
    error of their attention's output; here the costs of layers add up.

    bits      of a number of K and V, on average over the layers: 2 to 8
    layers    the bits themselves: k8v4x2-k4v2 are 8 for K and 4 for V in two layers, and 4 and 2 in all others; none: by
              what was measured
    group     tokens of K, and channels of V, that share a scale
    residual  last tokens that stay exact, at least
    pin       first tokens that stay exact
    """

    bits: float = 4.0
    layers: str | None = None
    group: int = 64
    residual: int = 64
    pin: int = 0
    state_type = GroupState
    kernels = Int.kernels

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}; give an average from 2 to 8")
        self._by_layer(0)  # refuses a text that says nothing
        self.at(0, 1)

    @property
    def calibrated(self) -> bool:
        return self.layers is not None

    @property
    def eviction_granularity(self) -> int:
        return self.group

    def at(self, layer: int, n_layers: int) -> Int:
        if self.layers is None:  # for estimates: all layers alike, with no less than these bits
            k, v = next(both for both in UNIFORM if sum(both) >= 2 * self.bits)
        else:
            k, v = self._by_layer(layer + 1)[layer]
        return Int(k=k, v=v, group=self.group, residual=self.residual, pin=self.pin)

    def _by_layer(self, n: int) -> list[tuple[int, int]]:
        """The bits of K and V of at least n layers, as `layers` says."""
        found = []
        for text in (self.layers or "k4v4").split("-"):
            match = re.fullmatch(r"k([248])v([248])(?:x(\d{1,4}))?", text)
            if not match:
                raise ValueError(f"layers={self.layers}; write k8v4x2-k4v2, with 2, 4 or 8 bits")
            found += [(int(match[1]), int(match[2]))] * int(match[3] or 1)
        if not found:
            raise ValueError(f"layers={self.layers} names no layer; write k8v4x2-k4v2")
        return found + [found[-1]] * (n - len(found))

    def with_costs(self, costs: Mapping[str, Sequence[float]]) -> Tuned:
        """This store with its `layers`. costs: "k" and "v" → what rounding that part of each layer to 2 bits costs."""
        chosen = allocate([*costs["k"], *costs["v"]], self.bits)
        n = len(chosen) // 2
        runs = [(both, len(list(same))) for both, same in groupby(zip(chosen[:n], chosen[n:], strict=True))]
        return replace(self, layers="-".join(f"k{k}v{v}" + (f"x{m}" if m > 1 else "") for (k, v), m in runs))

    def rounded(self, ops: Any, k: Tensor, v: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """K and V (B,Hkv,S,D), of which one part ("k" or "v") went through 2 bits, in whole groups of tokens."""
        x, channels = (k, 1) if part == "k" else (v, Int(group=self.group).v_group(v.shape[3]))
        tokens, n = (self.group if part == "k" else 1), x.shape[2] // self.group * self.group
        codes = ops.quantize(x[:, :, :n].contiguous(), BITS[0], tokens, channels)
        new = torch.cat((ops.dequantize(*codes, BITS[0]).to(x.dtype), x[:, :, n:]), 2)
        return (new, v) if part == "k" else (k, new)

    def incompatible_model(self, config: Any) -> str:
        if (n := len(self._by_layer(0))) > config.num_hidden_layers:
            return f"layers= names the bits of {n} layers, and this model has {config.num_hidden_layers}"
        return self.at(0, 1).incompatible_model(config)

    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        return self.at(0, 1).cost(config, dtype, sink)

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> Store:
        return self.at(ctx.layer, ctx.config.num_hidden_layers).pack(rows, policy, room, ctx)


def allocate(costs: Sequence[float], bits: float) -> list[int]:
    """The bits of each part. costs: of each part, what 2 bits cost. From 2 bits each, the part is raised that saves most
    per bit, as long as the average is at most `bits`.
    """
    level, spare = [0] * len(costs), (bits - BITS[0]) * len(costs)
    while True:
        steps = [
            (costs[i] * (SHARE[a] - SHARE[a + 1]) / (BITS[a + 1] - BITS[a]), -i)
            for i, a in enumerate(level)
            if a + 1 < len(BITS) and BITS[a + 1] - BITS[a] <= spare
        ]
        if not steps:
            return [BITS[a] for a in level]
        i = -max(steps)[1]
        spare -= BITS[level[i] + 1] - BITS[level[i]]
        level[i] += 1
