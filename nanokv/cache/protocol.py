"""The one page to read: what the model sees of a cache, and what a store must do.

A plan is keep × store × share: which tokens stay (`Policy`), how they lie in memory and are read (`StoreSpec`,
`Store`), which layers own storage (a map in `plan.py`). Prefill hands decode a `Kept`. Shapes: `model/llama.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nanokv.cache.context import Context
from nanokv.cache.kept import Kept
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


class Layer(Protocol):
    """One layer's side of a cache."""

    owns: bool  # False: the layer reads another one's keys and values; the model then computes no k and v

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        """Add tokens with k and v (B,Hkv,T,D), None if `owns` is False → attention (B,H,T,D). Each of their q (B,H,T,D) sees
        what is held up to its own token, within a sliding window. q and k are rotated to pos (B,T)."""


class Cache(Protocol):
    layers: Sequence[Layer]  # zipped with the model's layers; no layer index enters the model


class Store(Protocol):
    """The tokens that one layer holds, for B rows, in slots: see nanokv/cache/slots.py."""

    slots: Slots
    length: Tensor  # (B,Hkv) int32: tokens held
    needs_host_sync: bool  # a step over this store waits for the host, so it cannot be compiled or captured
    lossless_prefix: int | None  # of how many first tokens a file must hold K and V beside the codes; None: of all
    refill_ends_capture: bool  # a step that was captured or recorded before a `refill` cannot be replayed after it
    until_maintenance: int | None  # so many more tokens may come at once before `maintain`; None: any number

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Store new tokens: k, v (B,Hkv,T,D), pos (B,T). In place, with static shapes. The cache calls it with T = 1."""

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Store a piece of a turn after it attended: k, v (B,Hkv,T,D), pos (B,T), T > 1. May sync with the host."""

    def read(self, q: Tensor, pos: Tensor, q_sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention of q (B,H,T,D) → out, lse (B,H,T), scores if wanted. Sinks are read by q_sink: q, rotated back."""

    def maintain(self, written: int) -> bool | None:
        """Do what is due after `written` more tokens. Return True if the store's memory has moved."""

    def freeze(self) -> None:
        """From now on every step has the same shapes."""

    def unpack(self) -> list[Kept]:
        """What is held, one value per row, in temporal order."""

    def reserve(self, room: int) -> bool:
        """Make slots for `room` more tokens and keep what is held. False if the store must be packed again instead."""

    def refill(self, rows: list[Kept], room: int) -> bool:
        """Hold what a rescore left of the tokens that the policy saw; `room` as for `pack`. False if these do not fit."""

    def tensors(self) -> list[Tensor]:
        """Every tensor on the device, for the receipt."""

    def host_tensors(self) -> list[Tensor]:
        """Every tensor in the host's memory."""

    def used_bytes(self) -> tuple[int, int, int]:
        """Bytes in use on the device for K, for V (both with scales and exact tokens) and for bookkeeping."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec(ABC):
    """A store's options as they stand in a plan; `pack` builds the store of one layer."""

    eviction_granularity = 1  # tokens that share a scale and can only leave together
    pads_heads = True  # all heads take the slots of the longest one
    has_low_precision_tier = False  # it has a place for `Kept.demoted`
    merges_layers = False  # it holds neighbouring layers together, so no layer may read another one's storage
    selects_per_step = False  # a step reads what its query selects, a piece of a turn everything
    reads_by_chunk = False  # it has `SlotStore.read_by_chunk`
    implies = ()  # stores that a plan may name beside this one without effect: it holds tokens in the same way
    state_type = None  # the StoreState with which its rows are saved
    kernels = ()  # those that it runs beside the kernels of every step
    calibrated = True  # False: the model must be measured first, which `LLM.ready` does

    def at(self, layer: int, n_layers: int) -> StoreSpec:
        """The options of one of n layers; the default is the same for all."""
        return self

    def behind_prefix(self, n: int) -> StoreSpec | None:
        """The options for what follows a prefix of at least n tokens that all rows share; None: they share nothing."""
        return None

    def incompatible_policy(self, policy: Policy) -> str:
        """Why this store cannot hold what the policy keeps: the end of a sentence about the policy. Empty if it can."""
        if policy.positions_by_chunk and not self.reads_by_chunk:
            return "gives the keys of a chunk other positions for each query, which this store cannot read"
        if policy.demotes != self.has_low_precision_tier:
            none = "demotes nothing, so the low-precision tier would be empty: add demote=true if it ranks tokens"
            return "demotes tokens to a low-precision tier, which this store does not have" if policy.demotes else none
        if (n := self.eviction_granularity) > 1 and policy.evicts_out_of_order:
            return f"evicts single tokens all over the text while decoding, and here {n} tokens share a scale and leave together"
        return ""

    def incompatible_model(self, config: Any) -> str:
        """Why a model of this shape does not fit; empty if it does."""
        return ""

    def notice(self, n: int) -> str:
        """What the user should know about a prompt of n tokens; empty if nothing."""
        return ""

    @abstractmethod
    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        """Return (bytes_per_token, fixed_bytes) for one row of one layer. The first `sink` tokens are never evicted."""

    def device_bytes(
        self, config: Any, dtype: torch.dtype, cost: tuple[float, int], kept: int, ahead: int, demoted: int
    ) -> float:
        """Bytes on the device for one row of one layer: `kept`, `demoted` tokens and `ahead` free slots, at this cost."""
        return (kept + ahead) * cost[0] + cost[1]

    def host_bytes(self, config: Any, dtype: torch.dtype, kept: int, ahead: int) -> int:
        """The same for the host's memory."""
        return 0

    def constant_bytes(self, config: Any) -> int:
        """Bytes of the constants that all layers share."""
        return 0

    def prepack(self, kept: Kept, ctx: Context) -> Kept:
        """Convert one row of a finished layer, so that its dense keys and values can be freed before the next layer."""
        return kept

    @abstractmethod
    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> Store:
        """The store of one layer, with slots for `room` more tokens in every head that grows."""

    def link(self, stores: Sequence[Store]) -> None:  # noqa: B027 most stores have nothing to link
        """Receive the layers' stores so far, in order, after one was packed: for stores that know their neighbours."""
