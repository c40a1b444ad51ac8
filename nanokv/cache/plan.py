"""A plan is keep × store × share, as in `snapkv:budget=1024,window=32+int4+kvsharer:layers=4`: parsing, printing,
fitting to a prompt.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from nanokv.backends.base import scored_by_kernel
from nanokv.cache.budget import Workload
from nanokv.cache.protocol import StoreSpec
from nanokv.files import clipped
from nanokv.model.config import ModelConfig
from nanokv.policies import POLICIES
from nanokv.policies.base import Policy
from nanokv.sharing import SHARES
from nanokv.sharing.base import Sharing
from nanokv.stores import STORES


@dataclass(frozen=True)
class Plan:
    """Which tokens stay, how they lie in memory, and which layers own storage."""

    policy: Policy = POLICIES["full"]
    store: StoreSpec = STORES["dense"]
    share: Mapping[int, int] = field(default_factory=dict)  # reader layer → owner layer; other layers own their storage
    names: tuple[str, ...] = ("full", "dense")  # of the parts, in the order of the axes
    sharer: Sharing | None = None  # the search that `share` is the result of
    ready: bool = True  # whether `share` is known and the store calibrated; `LLM.ready` sees to it

    def owner(self, layer: int) -> int:
        return self.share.get(layer, layer)

    def rank(self, owner: int) -> int:
        """How many layers before this one own storage."""
        return owner - sum(reader < owner for reader in self.share)

    def n_owners(self, n_layers: int) -> int:
        """How many of n layers own storage."""
        return n_layers - len(self.share)

    def last_reader(self, owner: int) -> int:
        """The last layer that attends to this owner's keys and values; the owner itself if no other layer shares them."""
        return max([owner, *(i for i, o in self.share.items() if o == owner)])

    def slots_ahead(self, room: int, since_rescore: int = 0) -> int:
        """Slots for new tokens: for all that may come, or for those until the next rescore."""
        every = self.policy.rescore_every
        return min(room, every - since_rescore) if every else room

    def fit(self, config: ModelConfig, dtype: torch.dtype, prompt_len: int, room: int, rows: int = 1) -> Plan:
        """This plan for one prompt: percentages, bytes and thresholds as numbers. ValueError if it does not fit the
        model or the prompt.
        """
        if not self.ready:
            raise ValueError(f"{self} has not measured the model yet; call LLM.ready(plan) first")
        if reason := self.store.incompatible_model(config):
            raise ValueError(f"{self.names[1]}: {reason}")
        plan = replace(self, share=self.share or config.shared_layers)
        if plan.share and plan.store.merges_layers:
            raise ValueError(
                f"{self.names[1]}: layers are merged in pairs, and layers of this plan read another one's storage; use dense"
            )
        if plan.policy.cross_layer and plan.policy.rescore_every:
            raise ValueError(
                f"{plan.names[0]} chooses across layers and rescores while decoding; it can do one of them"
            )
        token_bytes, fixed_bytes = plan.cost(config, dtype)
        work = Workload(
            config.family,
            plan.n_owners(config.num_hidden_layers),
            prompt_len,
            room,
            rows,
            token_bytes,
            fixed_bytes,
            pads_heads=plan.store.pads_heads,
            context=config.max_position_embeddings,
            has_windows=config.has_windows,
        )
        return replace(plan, policy=plan.policy.fit(work))

    def cost(self, config: ModelConfig, dtype: torch.dtype) -> tuple[float, int]:
        """(bytes_per_token, fixed_bytes) for one row of one layer that owns storage, with what the policy needs
        besides.

        Where layers have different options it is their mean.
        """
        n, policy = config.num_hidden_layers, self.policy
        owners = [i for i in range(n) if self.owner(i) == i]
        costs = [self.store.at(i, n).cost(config, dtype, policy.protected_sinks) for i in owners]
        token_bytes = sum(token for token, _ in costs) / len(owners)
        fixed = sum(fixed for _, fixed in costs) // len(owners) + math.ceil(
            self.store.constant_bytes(config) / len(owners)
        )
        if policy.decode_request:  # one score per slot, and the spare entry of ragged slots
            return token_bytes + 4 * config.num_key_value_heads, fixed + 4
        if policy.rescore_every:  # the last queries of every layer
            queries = policy.rescore_request.buffered_queries * config.num_attention_heads * config.head_dim
            fixed += math.ceil(queries * dtype.itemsize * n / len(owners))
        return token_bytes, fixed

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that this plan runs beside those of every step."""
        scores = ("attention_scores",) if self._scores_by_kernel() else ()
        return *self.store.kernels, *scores, *(("take_lowest",) if self.policy.eviction == "score" else ())

    def _scores_by_kernel(self) -> bool:
        """Whether a kernel computes the scores of the prompt."""
        wanted = self.policy.request
        asks = wanted.last_queries != 0 or self.policy.passes(FAR) > 0
        return asks and scored_by_kernel(wanted.over_group, wanted.over_queries, wanted.gumbel_seed, wanted.near)

    def device_bytes(self, config: ModelConfig, dtype: torch.dtype, n: int, room: int) -> float:
        """One layer's bytes on the device for one row after a prompt of n tokens, once fitted: at most these on average over
        layers. Slots that pad shorter heads to the longest (`adakv+dense`) are not counted, because the text decides them.
        """
        kept, ahead = self._slots(n, room)
        demoted = n - kept + room if self.policy.demotes else 0
        return self.store.device_bytes(config, dtype, self.cost(config, dtype), kept, ahead, demoted)

    def host_bytes(self, config: ModelConfig, dtype: torch.dtype, n: int, room: int) -> int:
        """The same for the host's memory."""
        return self.store.host_bytes(config, dtype, *self._slots(n, room))

    def prompt_layers(self, n: int, n_layers: int, chunked: bool = False) -> int:
        """Of how many layers a prompt of n tokens is in memory uncompressed at once, once fitted."""
        p = self.policy
        waits = chunked or p.decide_after or p.cross_layer or p.passes(n)
        return self.n_owners(n_layers) if waits else 1

    def _slots(self, n: int, room: int) -> tuple[int, int]:
        """How many tokens a KV head keeps of a prompt of n at most, and how many slots it gets for later ones."""
        kept = self.policy.max_kept(n)
        return kept, self.slots_ahead(room) if self.policy.eviction == "none" else self.policy.max_kept(n + room) - kept

    def check_share(self, n_layers: int) -> None:
        """ValueError if more layers shall share than a model of n layers has beside the first."""
        if self.sharer and not self.sharer.map and self.sharer.layers >= n_layers:
            raise ValueError(
                f"{self.names[-1]}:layers={self.sharer.layers} is too many: this model has {n_layers} layers, and the first "
                f"owns its cache; give at most {n_layers - 1}"
            )

    def sketch(self, n_layers: int) -> Plan:
        """A plan for size estimates before the model is measured: as many layers share as asked, whichever they will be."""
        if self.sharer is None or self.ready:
            return replace(self, ready=True)
        self.check_share(n_layers)
        readers = self.sharer.layers
        return replace(self, share=dict.fromkeys(range(n_layers - readers, n_layers), 0), ready=True)

    def with_budget(self, text: str) -> Plan:
        """This plan under a kept budget given as text: tokens, percent or bytes."""
        try:
            return replace(self, policy=self.policy.with_budget(int(text) if text.lstrip("-").isdigit() else text))
        except ValueError as e:
            raise ValueError(f"{self.names[0]}: {e}") from None

    def with_store(self, name: str | None, given: Mapping[str, str], flags: Mapping[str, str]) -> Plan:
        """This plan with the named store, or its own if None, and these keys of it set. flags: key → the user's flag,
        for messages.
        """
        name = name or self.names[1]
        keys = {f.name for f in fields(STORES[name])}
        for key in given:
            if key in ("k", "v") and name[-1].isdigit():  # as in int8
                raise ValueError(
                    f"{flags[key]} and the store {name} both say how many bits; give the store int, or leave one out"
                )
            if key not in keys:
                others = [n for n, part in STORES.items() if key in {f.name for f in fields(part)}]
                raise ValueError(f"store {name} does not know {flags[key]}; use one of {', '.join(others)}")
        store = configure(name, STORES[name] if name != self.names[1] else self.store, given)
        check(self.names[0], self.policy, name, store)
        check_merges(name, store, self.names[2:])
        ready = store.calibrated and (self.sharer is None or self.ready)
        return replace(self, store=store, names=(self.names[0], name, *self.names[2:]), ready=ready)

    def __str__(self) -> str:
        parts = [self.policy, self.store] if self.sharer is None else [self.policy, self.store, self.sharer]
        return "+".join(canonical(name, part) for name, part in zip(self.names, parts, strict=True))


FAR = 1 << 20  # tokens of a prompt that is longer than any budget
AXIS_NAMES = "keep", "store", "share"
STORE_AXIS = "decide how they are stored"
AXES = {
    "decide which tokens stay": POLICIES,
    STORE_AXIS: STORES,
    "decide which layers own storage": SHARES,
}


def parse(text: str) -> Plan:
    """`name:key=value,key=value+name`, at most one part per axis. ValueError says what is allowed."""
    chosen: dict[str, tuple[str, Any]] = {}
    for piece in text.split("+"):
        name, _, given = piece.strip().partition(":")
        axis = next((a for a, parts in AXES.items() if name in parts), None)
        if name == "auto":
            raise ValueError(
                "auto is no part of a plan: it chooses one for a prompt; give --policy auto and --kv-budget"
            )
        if axis is None:
            names = [n for parts in AXES.values() for n in parts]
            kinds = zip(("policies", "stores", "share"), AXES.values(), strict=True)
            lists = "; ".join(f"{kind}: {', '.join(parts)}" for kind, parts in kinds)
            raise ValueError(f"unknown policy {name!r}{nearest(name, names)}; {lists}")
        part = configure(name, AXES[axis][name], _pairs(name, given))
        if axis in chosen:
            before, other = chosen[axis]
            if axis == STORE_AXIS and name in other.implies:
                continue
            if axis != STORE_AXIS or before not in part.implies:
                raise ValueError(f"{before} and {name} both {axis}; choose one")
        chosen[axis] = name, part
    policy, store, share = (chosen.get(axis) for axis in AXES)
    policy = policy or ("full", POLICIES["full"])
    if store is None:
        name, _, given = policy[1].default_store.partition(":")
        store = name, configure(name, STORES[name], _pairs(name, given))
    check(*policy, *store)
    check_merges(*store, [share[0]] if share else [])
    parts = [part for part in (policy, store, share) if part]
    return Plan(
        policy[1],
        store[1],
        names=tuple(name for name, _ in parts),
        sharer=share[1] if share else None,
        ready=share is None and store[1].calibrated,
    )


def check(policy_name: str, policy: Policy, store_name: str, store: StoreSpec) -> None:
    """ValueError if this store cannot hold what this policy keeps."""
    if reason := store.incompatible_policy(policy):
        others = [name for name, part in STORES.items() if name != store_name and not part.incompatible_policy(policy)]
        some = ", ".join(others[:8]) + (" or another (docs/plans.md has a table)" if len(others) > 8 else "")
        instead = f"; use one of {some}" if others else ""
        raise ValueError(f"{policy_name}+{store_name}: {policy_name} {reason}{instead}")


def check_merges(store_name: str, store: StoreSpec, sharers: Sequence[str]) -> None:
    """ValueError if the store merges layers that a sharer would let read another one's storage."""
    if sharers and store.merges_layers:
        raise ValueError(
            f"{store_name}+{sharers[0]}: layers are merged in pairs by {store_name}, and {sharers[0]} lets layers read another "
            "one's storage; leave one of the two out"
        )


def _pairs(name: str, text: str) -> dict[str, str]:
    pairs = {}
    for item in filter(None, text.split(",")):
        key, eq, value = item.partition("=")
        if not eq or not value:
            raise ValueError(f"{name}:{clipped(item)} is no key=value pair; write {name}:key=value,key=value")
        if key.strip() in pairs:
            raise ValueError(f"{name}: {clipped(key.strip())} is given twice; give it once")
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
                raise ValueError(f"{where}={clipped(text)} is out of range; give less than 2^31")
            return value
    if "str" in kinds and text.isprintable():
        return text
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "None": "none",
        "str": "a printable text",
    }
    raise ValueError(f"{where}={clipped(text)} cannot be read; it takes {' or '.join(names[k] for k in kinds)}")


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """' (did you mean …?)' or nothing."""
    close = difflib.get_close_matches(name, list(known), 3, 0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
