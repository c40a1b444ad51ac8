"""The receipt: what a cache holds, in bytes and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScoringPasses:
    """What the forward passes cost that only scored a prompt."""

    tokens: int
    seconds: float
    bytes: int  # of the prompt's keys and values in all layers, which stay uncompressed until the passes end


@dataclass(frozen=True)
class LayerReport:
    layer: int
    owner: int  # the layer whose storage this one reads
    bytes: int
    kept: list[list[int]]  # [row][KV head]: tokens held
    k_bits: float  # bits on the device per element of K, with scales and exact tokens; 0 if K lies on the host
    v_bits: float


@dataclass(frozen=True)
class Report:
    """`bytes` counts every storage that the cache holds on the device once. `full_bytes` counts K and V of every token of
    the text in every layer, in the cache's dtype, without positions and free slots.
    """

    bytes: int
    used_bytes: int  # of these, what is in use: without empty slots
    host_bytes: int
    full_bytes: int
    seen: list[int]  # how many tokens each row's text has, held or evicted
    layers: list[LayerReport]
    shared: int = 0  # so many first tokens are the same in all rows, and what stays of them is stored once

    @property
    def ratio(self) -> float:
        return self.full_bytes / self.bytes

    def _mean_bits(self, which: str) -> float:
        """Mean bits per stored element over all layers that own storage."""
        held = [sum(n for row in x.kept for n in row) if x.owner == x.layer else 0 for x in self.layers]
        return sum(n * getattr(x, which) for n, x in zip(held, self.layers, strict=True)) / sum(held)

    @property
    def evicting_layers(self) -> list[LayerReport]:
        """The layers in which some head holds less than the whole text."""
        return [x for x in self.layers if any(min(row) < n for row, n in zip(x.kept, self.seen, strict=True))]

    def as_dict(self, row: int = 0) -> dict:
        """For --json. `kept` per KV head is the row's own; bytes are of the whole cache, which all rows share."""
        totals = {k: getattr(self, k) for k in ("bytes", "used_bytes", "host_bytes", "full_bytes", "ratio")}
        totals["live_bytes"] = self.used_bytes  # the former name of `used_bytes`, for older readers of the JSON
        totals["shared"] = self.shared
        return {**totals, "layers": [{**asdict(x), "kept": x.kept[row]} for x in self.layers]}

    def __str__(self) -> str:
        line = f"kv: {mib(self.bytes)} of {mib(self.full_bytes)} dense ({self.ratio:.1f}x) · "
        total, layers = _range(self.seen), len(self.layers)
        if not self.evicting_layers:
            line += f"kept all {total} tokens in {layers}/{layers} layers"
        else:
            held = _range([n for x in self.evicting_layers for row in x.kept for n in row])
            line += f"kept {held}/{total} tokens in {len(self.evicting_layers)}/{layers} layers"
        if readers := sum(x.owner != x.layer for x in self.layers):
            line += f" · {readers} layers read another's"
        if self.shared:
            line += f" · what stays of the first {self.shared} once for {len(self.seen)} rows"
        line += f" · K {self._mean_bits('k_bits'):.3g} V {self._mean_bits('v_bits'):.3g} bits/elem"
        return f"{line} · host {mib(self.host_bytes)}"


def _range(numbers: Sequence[int]) -> str:
    lo, hi = min(numbers), max(numbers)
    return f"{lo}" if lo == hi else f"{lo}–{hi}"


def mib(n: int) -> str:
    if n < 2**20:
        return "0 B" if n == 0 else f"{n / 2**10:.1f} KiB"
    return f"{n / 2**20:.1f} MiB" if n < 2**30 else f"{n / 2**30:.2f} GiB"


def storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Address → bytes of the storages behind these tensors: a view counts as all the memory that it keeps alive."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
