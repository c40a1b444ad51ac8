"""Layers whose keys and values differ most can share a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.model.llama import Llama
from nanokv.sharing.base import Sharing
from nanokv.sharing.search import Pair, search


@dataclass(frozen=True, kw_only=True)
class KVSharer(Sharing):
    """KVSharer (Yang et al. 2024, arXiv:2410.18517, §3): `layers` layers own no cache and read an earlier one's.
    Pairs of layers are tried in the order of their distance, the most dissimilar first, and accepted while the
    model's output stays similar.

    Deviations from the authors' code: shared layers skip their K and V projections and rotation; while decoding every
    owner's cache grows (theirs overwrites some); calibration texts have one length, so none is dropped.

    layers     how many layers read another one and own no cache
    map        file with the map of layers; none: the map of an earlier search, or a new one
    threshold  least similarity of the model's output
    order      of the pairs that are tried: dissimilar, similar or random
    """

    threshold: float = 0.5  # lowest accepted mean cosine of the final hidden states
    order: str = "dissimilar"  # dissimilar | similar | random: which pairs are tried first; the last two are controls

    def __post_init__(self):
        if self.layers < 0 or not -1 <= self.threshold <= 1:
            raise ValueError(
                f"kvsharer:layers={self.layers},threshold={self.threshold} is out of range; layers ≥ 0, a cosine from −1 to 1"
            )
        if self.order not in ("dissimilar", "similar", "random"):
            raise ValueError(f"kvsharer:order={self.order}; orders are dissimilar, similar and random")

    def search(
        self, model: Llama, ops: Ops, texts: Tensor, tried: Callable[[Pair, bool], None]
    ) -> tuple[dict[int, int], list[Pair]]:
        return search(model, ops, texts, self.layers, self.threshold, self.order, tried)
