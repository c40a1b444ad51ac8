"""What the model sees of a cache, and what a store must do: the one page to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.slots import Slots
from nanokv.policies.base import Policy


class Layer(Protocol):
    """One layer's side of a cache."""

    owns: bool  # False: the layer reads another one's keys and values; the model then skips k_proj, v_proj, their RoPE

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        """q (B,H,T,D), k and v (B,Hkv,T,D) rotated to pos (B,T) → (B,H,T,D). k and v are None where `owns` is False."""


class Cache(Protocol):
    layers: Sequence[Layer]  # zipped with the model's layers; no layer index enters the model


@dataclass(frozen=True)
class Context:
    """What a store is built with: the model's shape, the backend, where and in which type its tensors live."""

    config: Any  # ModelConfig; a store reads head counts, head_dim and sliding_window of it
    ops: Any  # nanokv.ops.Ops
    device: torch.device
    dtype: torch.dtype
    inv_freq: Tensor  # (D/2,) fp32, the model's: for queries and keys that must be turned once more
    made: dict[str, Tensor] = field(default_factory=dict)  # constants that all layers share

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A constant, made when it is first asked for."""
        if name not in self.made:
            self.made[name] = make().to(self.device)
        return self.made[name]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def host(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the host's memory; pinned where the device is another one."""
        return torch.empty(shape, dtype=dtype or self.dtype, pin_memory=self.device.type == "cuda")

    def raw(self, k: Tensor, pos: Tensor) -> Tensor:
        """Keys (1,Hkv,N,D) at pos (1,Hkv,N), the same for all heads, as they were before their rotation: fp32."""
        angle = pos[0, 0, :, None].float() * -self.inv_freq
        cos, sin, (low, high) = angle.cos(), angle.sin(), k.float().chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class Store(Protocol):
    """One layer's kept tokens and every one that follows, for B rows."""

    slots: Slots
    waits: bool  # whether a step over it waits for the host, so that none can be captured

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """k, v (B,Hkv,1,D), pos (B,1): in place, static shapes, no host sync. The captured path."""

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """k, v (B,Hkv,T,D), pos (B,T), T > 1: host-level, after these tokens have attended."""

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """q (B,H,T,D) → out, lse (B,H,T) and the step's votes if the policy watches, over all that is stored.

        near (B,H,T,D): the same queries turned as if no gap lay between sinks and the rest; the sinks are read with these.
        """

    def maintain(self, written: int) -> bool | None:
        """Host-scheduled upkeep between steps; `written` counts tokens. → whether it now lies in other memory."""

    def freeze(self) -> None:
        """From now on every step has the same shapes."""

    exact: int | None  # of how many tokens, the first ones, `unpack` gives K and V as they came; none: of all

    def unpack(self) -> list[Kept]:
        """What is held, a value per row, in temporal order."""

    def reserve(self, room: int) -> bool:
        """Make slots for `room` tokens from here on, what is held staying; False if only packing it anew does."""

    def refill(self, rows: list[Kept], room: int) -> bool:
        """Hold these instead, in the same memory; False if they do not fit. `room` as for `pack`."""

    def tensors(self) -> list[Tensor]:
        """Everything it holds on the device, for the receipt."""

    def hosted(self) -> list[Tensor]:
        """… and what it holds in the host's memory."""

    def live(self) -> tuple[int, int, int]:
        """Bytes in use of K, of V (scales and what is still exact included) and of the bookkeeping."""

    @property
    def length(self) -> Tensor:
        """(B,Hkv) int32: tokens held."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec(ABC):
    """A store's options as they stand in a plan; `pack` builds the store of one layer."""

    granule = 1  # tokens that can only leave together
    pads = True  # whether all heads take the slots of the longest
    coarse = False  # whether it has a place for `Kept.rest`

    @property
    def most(self) -> int:
        """How many tokens may come between two calls of `maintain`; 0: any number."""
        return 0

    def refuses(self, keep: Policy) -> str:
        """Why it cannot hold what this policy keeps; empty if it can."""
        if keep.demotes and not self.coarse:
            return "hands back a second set to be held more coarsely, for which there is no place"
        if self.granule > 1 and keep.singly:
            return f"lets single tokens go while decoding, and here {self.granule} of them share a scale and leave together"
        if self.coarse and not keep.demotes:
            return "demotes nothing, so nothing would be coarse: add demote=true if it ranks tokens"
        return ""

    def note(self, n: int) -> str:
        """What to tell of a prompt of n tokens, where it is not held as one would think."""
        return ""

    def misfit(self, config: Any) -> str:
        """Why a model of this shape cannot be laid out so; empty if it can."""
        return ""

    @abstractmethod
    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        """Bytes per token and fixed bytes, of one row in one layer, of whose tokens the policy never lets the first `sink` go."""

    def held(self, config: Any, dtype: torch.dtype, cost: tuple[float, int], kept: int, ahead: int) -> float:
        """Bytes on the device of one row in one layer: `kept` tokens of a prompt, slots for `ahead` more, `cost` as the plan has it."""
        return (kept + ahead) * cost[0] + cost[1]

    def host_bytes(self, config: Any, dtype: torch.dtype, kept: int, ahead: int) -> int:
        """… and in the host's memory."""
        return 0

    def coarse_bytes(self, config: Any) -> float:
        """Bytes per token of `Kept.rest`."""
        return 0

    def shared(self, config: Any) -> int:
        """Bytes of the constants that all layers share."""
        return 0

    def early(self, kept: Kept, ctx: Context) -> Kept:
        """What `pack` needs of one row's layer, once that is complete: a store that can lets the dense prompt go before the next one."""
        return kept

    @abstractmethod
    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> Store:
        """The store of one layer, with slots for `room` more tokens in every head that grows."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer's cache lies: here, on the device, as its store lays it out (no paper)."""

    def refuses(self, keep: Policy, store: StoreSpec) -> str:
        """Why a cache kept and laid out so cannot lie here, said of it; empty if it can."""
        return ""

    def pack(self, store: StoreSpec, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> Store:
        """As `StoreSpec.pack`."""
        return store.pack(rows, policy, room, ctx)

    def host_bytes(self, config: Any, dtype: torch.dtype, slots: int) -> int:
        """Of so many slots of one layer, what lies on the host."""
        return 0

    def link(self, stores: Sequence[Store]) -> None:
        """Called with all layers' stores, in their order, whenever one has been packed."""
