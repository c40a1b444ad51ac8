"""Retrieval heads keep everything; streaming heads keep the beginning and the end only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Policy):
    """DuoAttention (Xiao et al. 2024, arXiv:2410.10819, §3): retrieval heads keep everything, streaming heads keep
    the first `sink` and the last `recent` tokens as a ring. `full` is the share of retrieval heads, rounded up.

    gates=FILE: the authors' trained gates, one line per layer with one number per KV head; the heads with the highest
    gates of the whole model are retrieval heads. Without a file (deviation: no training) each layer's heads are
    ranked on the prompt itself, by the attention that its last `window` queries give to the tokens that a streaming
    head would evict.

    full    share of KV heads that keep everything
    sink    first tokens that a streaming head keeps
    recent  last tokens that a streaming head keeps
    window  last queries by which heads are ranked
    gates   file of trained gates; none: rank the heads on the prompt
    """

    full: float = 0.5
    sink: int = 128
    recent: int = 256
    window: int = 32
    gates: str | None = None
    default_store = "ragged"
    eviction = "ring"

    def __post_init__(self):
        if not 0 <= self.full <= 1 or min(self.sink, self.recent - 1, self.window - 1) < 0:
            raise ValueError(
                f"duo:full={self.full},sink={self.sink},recent={self.recent},window={self.window} is out of range; "
                "full 0 … 1, sink ≥ 0, recent and window ≥ 1"
            )

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=0 if self.gates else self.window)

    @property
    def protected_sinks(self) -> int:
        return self.sink

    def keep(self, p: Prompt) -> Kept:
        edges = p.sinks(self.sink) | p.recent(self.recent)
        retrieval = self._trained(p) if self.gates else self._observed(p, edges)  # (1,Hkv) bool
        sink = max(0, self.sink - int(p.pos[0, 0, 0]))  # sinks that the model's own window has passed are gone
        limit = torch.where(retrieval, -1, sink + self.recent)
        stays = edges | retrieval[..., None]
        return Kept.top(p, stays.float(), stays.sum(-1), limit.int(), torch.where(retrieval, 0, sink).int())

    def _observed(self, p: Prompt, edges: Tensor) -> Tensor:
        middle = (p.attention * ~edges).sum(-1).sum(0, keepdim=True)  # (1,Hkv)
        rank = middle.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return rank < math.ceil(self.full * middle.shape[1])

    def _trained(self, p: Prompt) -> Tensor:
        try:
            if not Path(self.gates).is_file():  # reading a pipe would wait
                raise ValueError("no such file")
            with open(self.gates, encoding="utf-8") as f:
                table = torch.tensor([[float(x) for x in line.replace(",", " ").split()] for line in f if line.strip()])
            mine = table[p.layer].view(1, p.k.shape[1])
        except (OSError, ValueError, IndexError, RuntimeError, TypeError) as e:
            raise ValueError(
                f"duo:gates={self.gates} holds no number for each of {p.k.shape[1]} KV heads of layer {p.layer} ({e})"
            ) from None
        rank = table.flatten().argsort(descending=True, stable=True).argsort().view_as(table)[p.layer]
        return (rank < math.ceil(self.full * table.numel())).view_as(mine).to(p.k.device)
