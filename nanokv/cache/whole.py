"""A cache for one forward pass of whole texts, to measure a model with. Layers may share keys and values, and those of
single layers may be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.model.config import ModelConfig


class WholeCache:
    """`k` and `v` map each layer that owns storage to its keys and values (B,Hkv,T,D), of texts of equal length."""

    def __init__(
        self,
        share: Mapping[int, int],
        ops: Ops,
        config: ModelConfig,
        change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ):
        """share: reader layer → owner layer. change(layer, k, v) returns the keys and values to use instead."""
        self.ops, self.config, self.change = ops, config, change
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.layers = [WholeLayer(self, i, share.get(i, i)) for i in range(config.num_hidden_layers)]


class WholeLayer:
    def __init__(self, cache: WholeCache, index: int, owner: int):
        self.cache, self.owner, self.owns = cache, owner, owner == index

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        c, owner = self.cache, self.owner
        if self.owns:
            c.k[owner], c.v[owner] = c.change(owner, k, v) if c.change else (k, v)
        return c.ops.prefill(q, c.k[owner], c.v[owner], 0, c.config.window(owner))
