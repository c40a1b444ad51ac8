"""A plan is keep × store × share × place: `snapkv:budget=1024,window=32+dense+kvsharer:layers=4+offload`. Parsing, printing, fitting it to
a prompt.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from nanokv.cache.budget import Case
from nanokv.cache.protocol import Place, StoreSpec
from nanokv.model.config import ModelConfig
from nanokv.policies import POLICIES
from nanokv.policies.base import Policy
from nanokv.sharing import SHARES
from nanokv.sharing.kvsharer import KVSharer
from nanokv.stores import STORES
from nanokv.stores.host import PLACES


@dataclass(frozen=True)
class Plan:
    """Which tokens stay, how they lie in memory, which layers own storage (reader → owner; a layer not named owns its own), and where."""

    keep: Policy = POLICIES["full"]
    store: StoreSpec = STORES["dense"]
    share: Mapping[int, int] = field(default_factory=dict)
    names: tuple[str, str, str] = ("full", "dense", "device")
    sharer: KVSharer | None = None  # whose map `share` is …
    ready: bool = True  # … and whether it is there yet; `LLM.ready` sees to that
    place: Place = PLACES["device"]

    def owner(self, layer: int) -> int:
        return self.share.get(layer, layer)

    def rank(self, owner: int) -> int:
        """How many layers before this one own storage."""
        return owner - sum(reader < owner for reader in self.share)

    def last_reader(self, owner: int) -> int:
        return max([owner, *(i for i, o in self.share.items() if o == owner)])

    def ahead(self, room: int, fresh: int = 0) -> int:
        """Slots for new tokens: for all that may come, or until the policy looks again, `fresh` tokens after it looked last."""
        return min(room, self.keep.every - fresh) if self.keep.every else room

    def fit(self, config: ModelConfig, dtype: torch.dtype, prompt_len: int, room: int, rows: int = 1) -> Plan:
        """This plan for one prompt: percents, bytes and thresholds as numbers."""
        if not self.ready:
            raise ValueError(f"{self} has no map of layers yet; LLM.ready finds or makes the one of a loaded model")
        if why := self.store.misfit(config):
            raise ValueError(f"{self.names[1]}: {why}")
        token_bytes, fixed = self.cost(config, dtype)
        owners = config.num_hidden_layers - len(self.share)
        return replace(
            self,
            keep=self.keep.fit(
                Case(config.family, owners, prompt_len, room, rows, token_bytes, fixed, self.store.pads)
            ),
        )

    def cost(self, config: ModelConfig, dtype: torch.dtype) -> tuple[float, int]:
        """Bytes per token and fixed bytes, of one row in one owning layer, with what the policy needs beside the store's."""
        token_bytes, fixed = self.store.cost(config, dtype, self.keep.sink)
        owners = config.num_hidden_layers - len(self.share)
        fixed += math.ceil(self.store.shared(config) / owners)
        if self.keep.watches:  # a vote beside each position
            return token_bytes + 4 * config.num_key_value_heads, fixed + 4
        if self.keep.every:  # the last queries of every layer
            tail = self.keep.again.tail * config.num_attention_heads * config.head_dim * dtype.itemsize
            fixed += math.ceil(tail * config.num_hidden_layers / owners)
        return token_bytes, fixed

    def held(self, config: ModelConfig, dtype: torch.dtype, n: int, room: int) -> float:
        """At most how many bytes one layer takes on the device after a prompt of n tokens, for one row, once fitted: for estimates."""
        kept, ahead = self.keep.holds(n), self.ahead(room)
        demoted = (n - kept + room) * self.store.coarse_bytes(config) if self.keep.demotes else 0
        size = self.store.held(config, dtype, self.cost(config, dtype), kept, ahead) + demoted
        return size - self.place.host_bytes(config, dtype, kept + ahead)

    def hosted(self, config: ModelConfig, dtype: torch.dtype, n: int, room: int) -> int:
        """… and how many in the host's memory."""
        kept, ahead = self.keep.holds(n), self.ahead(room)
        slots = self.place.host_bytes(config, dtype, kept + ahead)
        return slots + self.store.host_bytes(config, dtype, kept, ahead)

    def sketch(self, n_layers: int) -> Plan:
        """For sizes before there is a map: as many layers share as asked, whichever they will be."""
        if self.ready:
            return self
        readers = min(self.sharer.layers, n_layers - 1)
        return replace(self, share=dict.fromkeys(range(n_layers - readers, n_layers), 0), ready=True)

    def with_budget(self, text: str) -> Plan:
        """This plan under a kept budget given as text: tokens, percent or bytes."""
        return replace(self, keep=self.keep.with_budget(int(text) if text.lstrip("-").isdigit() else text))

    def with_store(self, name: str | None, given: Mapping[str, str], flags: Mapping[str, str]) -> Plan:
        """This plan with this store, or its own, and keys of it set, as `flags` calls them to the user."""
        name = name or self.names[1]
        keys = {f.name for f in fields(STORES[name])}
        for key in given:
            if key not in keys:
                others = [n for n, part in STORES.items() if key in {f.name for f in fields(part)}]
                raise ValueError(f"store {name} does not know {flags[key]}; use one of {', '.join(others)}")
        store = configure(name, STORES[name] if name != self.names[1] else self.store, given)
        keep, _, place = self.names
        check((keep, self.keep), (name, store), (place, self.place))
        return replace(self, store=store, names=(keep, name, place))

    def __str__(self) -> str:
        own = zip(self.names, (self.keep, self.store, self.place), strict=True)
        parts = [canonical(name, part) for name, part in own if name != "device"]
        return "+".join(parts if self.sharer is None else [*parts, canonical("kvsharer", self.sharer)])


AXES = {
    "decide which tokens stay": POLICIES,
    "decide how they are stored": STORES,
    "decide which layers own storage": SHARES,
    "decide where it lies": PLACES,
}


def parse(text: str) -> Plan:
    """`name:key=value,key=value+name`, at most one part per axis. ValueError says what is allowed."""
    chosen: dict[str, tuple[str, Any]] = {}
    for piece in text.split("+"):
        name, _, rest = piece.strip().partition(":")
        axis = next((a for a, parts in AXES.items() if name in parts), None)
        if axis is None:
            names = [n for parts in AXES.values() for n in parts]
            kinds = zip(("policies", "stores", "share", "place"), AXES.values(), strict=True)
            lists = "; ".join(f"{kind}: {', '.join(parts)}" for kind, parts in kinds)
            raise ValueError(f"unknown policy {name!r}{nearest(name, names)}; {lists}")
        if axis in chosen:
            raise ValueError(f"{chosen[axis][0]} and {name} both {axis}; choose one")
        chosen[axis] = name, configure(name, AXES[axis][name], _pairs(name, rest))
    keep_axis, store_axis, share_axis, place_axis = AXES
    keep = chosen.get(keep_axis, ("full", POLICIES["full"]))
    name, _, rest = keep[1].store.partition(":")
    store = chosen.get(store_axis) or (name, configure(name, STORES[name], _pairs(name, rest)))
    _, sharer = chosen.get(share_axis, ("", None))
    place = chosen.get(place_axis, ("device", PLACES["device"]))
    check(keep, store, place)
    names = keep[0], store[0], place[0]
    return Plan(keep[1], store[1], place=place[1], names=names, sharer=sharer, ready=sharer is None)


def check(keep: tuple[str, Policy], store: tuple[str, StoreSpec], place: tuple[str, Place]) -> None:
    """ValueError if this store cannot hold what this policy keeps, or not in this place; of each its name and part."""
    if why := store[1].refuses(keep[1]):
        others = [name for name, part in STORES.items() if name != store[0] and not part.refuses(keep[1])]
        instead = f"; use one of {', '.join(others)}" if others else ""
        raise ValueError(f"{keep[0]}+{store[0]}: {keep[0]} {why}{instead}")
    if why := place[1].refuses(keep[1], store[1]):
        raise ValueError(f"{keep[0]}+{store[0]}+{place[0]}: {why}")


def _pairs(name: str, text: str) -> dict[str, str]:
    pairs = {}
    for item in filter(None, text.split(",")):
        key, eq, value = item.partition("=")
        if not eq or not value:
            raise ValueError(f"{name}:{item} is no key=value pair; write {name}:key=value,key=value")
        if key.strip() in pairs:
            raise ValueError(f"{name}: {key.strip()} is given twice; give it once")
        pairs[key.strip()] = value.strip()
    return pairs


def canonical(name: str, part: Any) -> str:
    """`name:key=value,…` with every field filled in."""
    found = {f.name: getattr(part, f.name) for f in fields(part)}
    values = ",".join(f"{k}={str(v).lower() if v is None or isinstance(v, bool) else v}" for k, v in found.items())
    return f"{name}:{values}" if values else name


def configure(name: str, part: Any, given: Mapping[str, str]) -> Any:
    """`part` with the given texts set, each read as the type its field is annotated with."""
    kinds = {f.name: [k.strip() for k in str(f.type).split("|")] for f in fields(part)}
    for key in given:
        if key not in kinds:
            allowed = f"its keys are {', '.join(kinds)}" if kinds else "it takes none"
            raise ValueError(f"{name} has no key {key!r}{nearest(key, kinds)}; {allowed}")
    values = {key: _read(f"{name}:{key}", text, kinds[key]) for key, text in given.items()}
    try:
        return replace(part, **values)
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(name) else f"{name}: {e}") from None


def _read(where: str, text: str, kinds: Sequence[str]) -> int | float | bool | str | None:
    low = text.lower()
    if "None" in kinds and low == "none":
        return None
    if "bool" in kinds and low in ("true", "false"):
        return low == "true"
    for kind, read in (("int", int), ("float", float)):
        if kind in kinds:
            try:
                value = read(text)
            except ValueError:
                continue
            if abs(value) >= 2**31:
                raise ValueError(f"{where}={text} is out of range; give less than 2^31")
            return value
    if "str" in kinds:
        return text
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "None": "none"}
    raise ValueError(f"{where}={text} cannot be read; it takes {' or '.join(words[k] for k in kinds)}")


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """' (did you mean …?)' or nothing."""
    close = difflib.get_close_matches(name, list(known), 3, 0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
