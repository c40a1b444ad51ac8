"""The oracles that the tests hold nanokv to: a full cache with a boolean mask, and the papers' rules as loops over lists."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class MaskedCache:
    """A cache of everything, in which query token i of head h sees key token j only if `seen(layer, h, i, j)` and j ≤ i and the
    model's sliding window allow it. Plain loops over softmax rows, fp64 inside.
    """

    owns = True

    def __init__(self, config, seen):
        self.config, self.seen = config, seen
        self.layers = [MaskedLayer(self, i) for i in range(config.num_hidden_layers)]


class MaskedLayer:
    owns = True

    def __init__(self, cache: MaskedCache, index: int):
        self.cache, self.index, self.k, self.v = cache, index, [], []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        cfg = self.cache.config
        self.k += list(k[0].transpose(0, 1).double())  # one (Hkv,D) per token
        self.v += list(v[0].transpose(0, 1).double())
        keys, values, out = torch.stack(self.k), torch.stack(self.v), torch.zeros_like(q)
        group = cfg.num_attention_heads // cfg.num_key_value_heads
        for t, i in enumerate(pos[0].tolist()):
            for h in range(cfg.num_attention_heads):
                kv = h // group
                near = (j for j in range(i + 1) if cfg.sliding_window is None or j > i - cfg.sliding_window)
                cols = [j for j in near if j == i or self.cache.seen(self.index, kv, i, j)]
                score = keys[cols, kv] @ q[0, h, t].double() / math.sqrt(cfg.head_dim)
                out[0, h, t] = (score.softmax(0) @ values[cols, kv]).to(q.dtype)
        return out


def attention(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """(H,T,D) queries of the last T tokens, (Hkv,S,D) keys → causal softmax weights (H,T,S), fp64."""
    H, T, D = q.shape
    Hkv, S, _ = k.shape
    weight = torch.zeros(H, T, S, dtype=torch.float64)
    for h in range(H):
        for t in range(T):
            i = S - T + t
            lo = 0 if window is None else max(0, i - window + 1)
            score = k[h // (H // Hkv), lo : i + 1].double() @ q[h, t].double() / math.sqrt(D)
            weight[h, t, lo : i + 1] = score.softmax(0)
    return weight


def snapkv(weight: Tensor, budget: int, window: int, kernel: int, pool: str, group: str = "mean") -> list[list[int]]:
    """SnapKV's steps over lists. weight (G,window,T): one KV head's query heads → positions kept."""
    T = weight.shape[2]
    if budget >= T:
        return list(range(T))
    votes = []
    for j in range(T - window):
        of_head = [sum(weight[g, w, j].item() for w in range(window)) for g in range(weight.shape[0])]
        votes.append(sum(of_head) / len(of_head) if group == "mean" else max(of_head))
    pooled = []
    for j in range(T - window):
        near = [votes[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < T - window]
        pooled.append(max(near) if pool == "max" else sum(near) / kernel)
    best = sorted(range(T - window), key=lambda j: (-pooled[j], j))[: budget - window]
    return sorted(best) + list(range(T - window, T))


def streaming(T: int, sink: int, recent: int, now: int | None = None) -> list[int]:
    """Positions a streaming layer holds after a prompt of T and, if given, all tokens up to `now`."""
    end = T if now is None else now + 1
    return [j for j in range(end) if j < sink or j >= end - recent]


def laziness(weight: Tensor, sink: int, recent: int) -> float:
    """SimLayerKV's score. weight (H,rows,T) of the judging queries."""
    H, rows, T = weight.shape
    edge = [j for j in range(T) if j < sink or j >= T - recent]
    return sum(weight[h, r, j].item() for h in range(H) for r in range(rows) for j in edge) / (H * rows)
