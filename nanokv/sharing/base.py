"""`Sharing` decides which layers own no cache and read an earlier layer's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.model.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Sharing(ABC):
    """The options of a search for layers that can share a cache.

    layers  how many layers own no cache
    map     a file with the result of an earlier search; none: the default file, see `map_file`
    """

    layers: int = 4
    map: str | None = None

    @abstractmethod
    def search(
        self, model: Llama, ops: Ops, texts: Tensor, tried: Callable[[Any, bool], None]
    ) -> tuple[dict[int, int], list[Any]]:
        """texts (n,T) token ids → reader layer → owner layer, and the accepted pairs. tried(pair, accepted) is called
        for every pair.
        """
