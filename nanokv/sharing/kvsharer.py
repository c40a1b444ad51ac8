"""Layers that are unlike each other can share a cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KVSharer:
    """KVSharer (Yang et al. 2024, arXiv:2410.18517, §3): `layers` layers own no cache but read an earlier one's. Pairs of layers are tried
    in the order of their distance, the most unlike first, and accepted while the model's output stays similar.

    Deviations from the authors' code: shared layers skip their K and V projections and rotation; while decoding every owner's cache
    grows (theirs overwrites some); calibration texts are of one length, so none is dropped.
    """

    layers: int = 4
    threshold: float = 0.5  # least mean cosine of the final hidden states
    order: str = "dissimilar"  # dissimilar | similar | random: which pairs come first; the last two are controls
    map: str | None = None  # a file of the search's; none: where it puts them

    def __post_init__(self):
        if self.layers < 0 or not -1 <= self.threshold <= 1:
            raise ValueError(
                f"kvsharer:layers={self.layers},threshold={self.threshold} is out of range; layers ≥ 0, a cosine from −1 to 1"
            )
        if self.order not in ("dissimilar", "similar", "random"):
            raise ValueError(f"kvsharer:order={self.order}; orders are dissimilar, similar and random")
