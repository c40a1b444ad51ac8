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
# the divergence with so many bits, as a share of that with 2: it falls with the square of the step between two levels
SHARE = [(3 / (2**bits - 1)) ** 2 for bits in BITS]
UNIFORM = (2, 2), (4, 2), (4, 4), (8, 4), (8, 8)  # bits of K and V, where nothing has been measured


@dataclass(frozen=True, kw_only=True)
class Tuned(StoreSpec):
    """KVTuner (Li et al. 2025, arXiv:2502.04420): K and V of each layer get the bits that they need, so that the numbers of
    the cache have `bits` bits on average. Tokens are rounded and held as in store int.

    The sensitivity of a layer's K or V is measured once for a model and a group: a text is read with that part alone
    rounded to 2 bits, and the sensitivity is the divergence (KL) of the model's next-token distribution from that
    without rounding. With more bits it is taken to fall with the square of the rounding error. From 2 bits each, the bits
    then go where one more bit gains most. A part gets 8 bits while another has 2 only if it is 48 times as sensitive, so
    bits=4 is mostly `int4`. Deviations: the paper searches for whole assignments by the accuracy on a task, after it has
    grouped the layers by the error of their attention's output; here the divergences of layers add up.

    bits      of a code of K or V, on average over the layers, without scales and exact tokens: 2 to 8; read only where
              `layers` is none
    layers    the bits themselves, from the first layer on. k8v4x2-k4v2 means: 8 bits for K and 4 for V in two layers, then
              4 and 2 in all others. none: by the sensitivity
    group     tokens of K, and channels of V, that share a scale
    residual  last tokens that stay exact, at least
    pin       first tokens that stay exact
    """

    bits: float = 3.0
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
                raise ValueError(
                    f"layers={self.layers}: {text!r} is no k8v4 or k8v4x2 (K 8 bits, V 4, in two layers); bits are 2, 4 or 8"
                )
            found += [(int(match[1]), int(match[2]))] * int(match[3] or 1)
        if not found:
            raise ValueError(f"layers={self.layers} names no layer; write k8v4x2-k4v2")
        return found + [found[-1]] * (n - len(found))

    def with_sensitivity(self, sensitivity: Mapping[str, Sequence[float]]) -> Tuned:
        """This store with its `layers`. sensitivity: "k" and "v" → that of each layer."""
        chosen = allocate([*sensitivity["k"], *sensitivity["v"]], self.bits)
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
        return self.at(0, 1).cost(config, dtype, sink)  # the first layer's; `Plan.cost` asks each layer for its own

    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> Store:
        return self.at(ctx.layer, ctx.config.num_hidden_layers).pack(rows, policy, room, ctx)


def allocate(sensitivity: Sequence[float], bits: float) -> list[int]:
    """The bits of each part, by the sensitivity of each. From 2 bits each, the part is raised that gains most per bit, as
    long as the average is at most `bits`.
    """
    level, spare = [0] * len(sensitivity), (bits - BITS[0]) * len(sensitivity)
    while True:
        steps = [
            (sensitivity[i] * (SHARE[a] - SHARE[a + 1]) / (BITS[a + 1] - BITS[a]), -i)
            for i, a in enumerate(level)
            if a + 1 < len(BITS) and BITS[a + 1] - BITS[a] <= spare
        ]
        if not steps:
            return [BITS[a] for a in level]
        i = -max(steps)[1]
        spare -= BITS[level[i] + 1] - BITS[level[i]]
        level[i] += 1
