"""`Context`: everything besides tokens that a cache and its stores are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What a cache needs to know of the model, the backend and the device, and the constants that its layers share."""

    config: Any  # ModelConfig
    ops: Any  # nanokv.backends.base.Ops
    device: torch.device
    dtype: torch.dtype
    inv_freq: Tensor  # (D/2,) fp32, the model's rotation
    layer: int = 0  # that this context is for
    sliding_window: int | None = None  # of that layer, in tokens
    output_weights: Sequence[Tensor] = ()  # (C, H·D) of each layer, for policies that ask for them
    token_kinds: Callable[[], Tensor] | None = None  # makes (vocab,) uint8, see `Prompt.token_kinds`
    encode: Callable[[str], Sequence[int]] | None = None  # text → token ids, for policies that write instructions
    constants: dict[str, Tensor] = field(default_factory=dict)  # tensors that all layers share

    def of_layer(self, layer: int) -> Context:
        """This context for one layer's store."""
        return replace(self, layer=layer, sliding_window=self.config.window(layer))

    def shared_constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that all layers share, made when it is first asked for."""
        if name not in self.constants:
            self.constants[name] = make().to(self.device)
        return self.constants[name]

    def token_ids(self, text: str) -> Tensor:
        """The token ids (n,) of a text; none without a tokenizer."""
        return torch.tensor(self.encode(text) if self.encode else [], dtype=torch.int64, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def empty_on_host(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the host's memory, pinned where the device is another one."""
        return torch.empty(shape, dtype=dtype or self.dtype, pin_memory=self.device.type == "cuda")
