"""The plain values between prefill and decode: `Prompt`, what a policy sees of one layer, and `Kept`, what it decides
to keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NORM_BLOCK = 4096  # tokens in one matrix product where norms are measured


class StoreState(ABC):
    """A row's tokens in a store's own form, such as codes and scales, so that saving or packing them again never
    rounds a second time.

    Each store that rounds has a record type of its own; `StoreSpec.state_type` names it.
    """

    @abstractmethod
    def select(self, index: Tensor) -> StoreState:
        """The state of the tokens at index (1,Hkv,N)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Named tensors, for a file."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StoreState:
        """The record that `tensors` described. KeyError if one is missing."""

    @abstractmethod
    def check(self, row: Kept, spec: Any, ctx: Any) -> None:
        """ValueError unless this can be the state of that row in a store of these options. A file may say anything."""


def n_still_visible(sliding_window: int) -> int:
    """How many of a text's last tokens the next one sees under this window, itself left out. At least one, although a
    window of one token shows none: a policy always has a token to keep.
    """
    return max(1, sliding_window - 1)


@dataclass
class Prompt:
    """One layer of one row as a policy sees it: the prompt after its attention or, at a rescore, all that the cache holds of
    the text so far. `keep` never sees a batch.
    """

    layer: int
    rank: int  # how many layers before this one own storage
    owners: int  # how many layers of the model own storage
    seen: int  # tokens of text so far
    n_visible: int  # how many of them the model's own sliding window still shows to the next token
    k: Tensor  # (1,Hkv,N,D), rotated
    v: Tensor  # (1,Hkv,N,D)
    pos: Tensor  # (1,Hkv,N) int32 absolute positions, ascending; −1 pads a head that holds fewer tokens
    # (readers,Hkv,N) fp32: a plane per layer that reads these keys; one at a rescore under `decode_request`
    attention: Tensor | None
    n_queries: int  # how many queries scored the keys; 0 where only blocks of the prompt or decode steps did
    ops: Any  # the backend; `Kept.top` moves tokens with it
    q_mean: Tensor | None = None  # (readers,H,D) fp32, of queries before rotation; only if asked for
    q_cov: Tensor | None = None  # (readers,H,D,D)
    q_abs: Tensor | None = None  # (readers,H,D/2) the mean length of each pair of channels that is rotated together
    inv_freq: Tensor | None = None  # (D/2,) the rotation's angle per position
    state: StoreState | None = None  # at a rescore: these tokens in the store's own form
    w_o: Tensor | None = None  # (C, H·D) the output projection of this layer; only if asked for
    # cosine similarity of the residual stream before and after this layer's attention, mean over tokens; only if asked for
    similarity: float | None = None
    tokens: Tensor | None = None  # (seen,) int64 token ids of the text; None where a cache was loaded from a file
    token_kinds: Tensor | None = None  # (seen,) uint8: 1 for a special token, 2 for punctuation; only if asked for
    second_attention: Tensor | None = None  # as `attention`, of the policy's `second_request`
    queries: Tensor | None = None  # (readers,H,w,D) the prompt's last queries, rotated; only if asked for

    def __len__(self) -> int:
        return self.k.shape[2]

    @property
    def valid(self) -> Tensor:
        """bool (1,Hkv,N): the entry is a token, not padding."""
        return self.pos >= 0

    def sinks(self, n: int) -> Tensor:
        """bool (1,Hkv,N): the entry is one of the text's first n tokens."""
        return self.valid & (self.pos < n)

    def recent(self, n: int) -> Tensor:
        """bool (1,Hkv,N): the entry is one of the text's last n tokens."""
        return self.pos >= max(0, self.seen - n)

    def output_norms(self, order: int = 1) -> Tensor:
        """(1,Hkv,N) fp32: |W_o v|₁, or another norm: how much a value changes the layer's output if it gets all attention;
        the mean over the query heads that read it. For policies whose `request` asks for the output projection.
        """
        heads, n, dim = self.v.shape[1:]
        weights = self.w_o.unflatten(1, (heads, -1, dim))  # (C,Hkv,G,D)
        found = self.v.new_empty(1, heads, n, dtype=torch.float32)
        for h in range(heads):
            for a in range(0, n, NORM_BLOCK):
                v = self.v[0, h, a : a + NORM_BLOCK].to(weights.dtype)
                norms = [(v @ w.T).float().norm(order, -1) for w in weights[:, h].unbind(1)]
                found[0, h, a : a + NORM_BLOCK] = sum(norms) / len(norms)
        return found


@dataclass(frozen=True)
class Kept:
    """What one row keeps in one layer. It is a value: it can be saved, packed twice or trimmed again."""

    k: Tensor  # (1,Hkv,N,D)
    v: Tensor  # (1,Hkv,N,D)
    pos: Tensor  # (1,Hkv,N) int32, ascending, padded with −1 behind `length`
    length: Tensor  # (1,Hkv) int32: how many tokens each head really keeps
    limit: Tensor  # (1,Hkv) int32: the most tokens a head may hold; −1: no limit, it grows
    sink: Tensor  # (1,Hkv) int32: how many first slots a ring never overwrites
    running_scores: Tensor | None = None  # (1,Hkv,N) fp32, for policies that update their scores while decoding
    layer_score: float = 0.0  # one number for the whole layer, for rules across layers and for `--explain`
    # the next set of tokens, to be held at lower precision; `mixed` unpacks up to three sets
    demoted: Kept | None = None
    state: StoreState | None = None  # these tokens in the store's own form, such as codes and scales

    @classmethod
    def all(
        cls,
        p: Prompt,
        limit: int | Tensor = -1,
        sink: int = 0,
        running_scores: Tensor | None = None,
        layer_score: float = 0.0,
    ) -> Kept:
        """Every token of the prompt, with running scores (1,Hkv,N) if given."""
        length = p.valid.sum(-1, dtype=torch.int32)
        ones = torch.ones_like(length)
        return cls(
            _owned(p.k),
            _owned(p.v),
            _owned(p.pos),
            length,
            ones * limit,
            ones * sink,
            running_scores,
            layer_score,
            state=p.state,
        )

    @classmethod
    def top(
        cls,
        p: Prompt,
        score: Tensor,
        n: int | Tensor,
        limit: int | Tensor = -1,
        sink: int | Tensor = 0,
        running_scores: Tensor | None = None,
    ) -> Kept:
        """The n best tokens of each head in temporal order. Among equal scores the earlier token wins.

        score (1,Hkv,N): +inf for a token that must stay. n, limit, sink: one number, or (1,Hkv) where heads differ.
        """
        most = min(n, len(p)) if isinstance(n, int) else None  # known without waiting for the device
        n = p.valid.sum(-1, dtype=torch.int32).clamp(max=n).int()
        score = score.masked_fill(~p.valid, -torch.inf)
        best = score.argsort(dim=-1, descending=True, stable=True)[..., : int(n.max()) if most is None else most]
        valid = torch.arange(best.shape[-1], device=n.device) < n[..., None]
        index = best.masked_fill(~valid, len(p)).sort(dim=-1).values  # temporal order, padding last
        valid, index = index < len(p), index.clamp(max=len(p) - 1)
        k, v, pos = p.ops.compact(p.k, p.v, p.pos, index.masked_fill(~valid, -1))
        ones = torch.ones_like(n)
        scores = None if running_scores is None else running_scores.gather(2, index)
        state = None if p.state is None else p.state.select(index)
        return cls(k, v, pos, n.clone(), ones * limit, ones * sink, scores, state=state)

    def in_window(self, seen: int, sliding_window: int | None) -> Kept:
        """Of the tokens among the first `seen`, drop those that no later token sees; see `n_still_visible`."""
        if sliding_window is None:
            return self
        first = seen - n_still_visible(sliding_window)
        return self.since(first)

    def before(self, pos: int) -> Kept:
        """The tokens before this position."""
        return self._range(torch.zeros_like(self.length), self._count_before(pos))

    def since(self, pos: int) -> Kept:
        """The tokens from this position on."""
        return self._range(self._count_before(pos), self.length)

    def _count_before(self, pos: int) -> Tensor:
        return ((self.pos >= 0) & (self.pos < pos)).sum(-1, dtype=torch.int32)

    def _range(self, a: Tensor, b: Tensor) -> Kept:
        """The tokens a … b−1 (1,Hkv) of each head."""
        index = torch.arange(max(1, int((b - a).max())), device=self.pos.device) + a[..., None]
        valid = index < b[..., None]
        index = index.masked_fill(~valid, 0)
        row = index[..., None].expand(*index.shape, self.k.shape[3])
        return replace(
            self,
            k=self.k.gather(2, row),
            v=self.v.gather(2, row),
            pos=self.pos.gather(2, index).masked_fill(~valid, -1),
            length=b - a,
            running_scores=None if self.running_scores is None else self.running_scores.gather(2, index),
            state=None if self.state is None else self.state.select(index),
        )

    def joined(self, later: Kept) -> Kept:
        """The tokens of both, where all of `later` stand behind these. Without their state, so not to be packed again."""
        k, v, pos = (torch.cat(pair, 2) for pair in ((self.k, later.k), (self.v, later.v), (self.pos, later.pos)))
        order = torch.where(pos < 0, torch.iinfo(torch.int32).max, pos).argsort(-1)  # padding last
        order = order[:, :, : int((self.length + later.length).max())]
        row = order[..., None].expand(*order.shape, k.shape[3])
        k, v, pos = k.gather(2, row), v.gather(2, row), pos.gather(2, order)
        return replace(later, k=k, v=v, pos=pos, length=self.length + later.length, state=None)

    def demote_others(self, p: Prompt) -> Kept:
        """The same, with all other tokens of the prompt as `demoted`."""
        mine = torch.nn.functional.pad(self.pos, (0, 1), value=-1)  # searchsorted needs at least one entry
        mine = torch.where(mine < 0, torch.iinfo(torch.int32).max, mine)
        index = torch.searchsorted(mine, p.pos.contiguous()).clamp(max=mine.shape[2] - 1)
        is_kept = mine.gather(2, index) == p.pos
        score = torch.zeros_like(p.pos, dtype=torch.float32).masked_fill(is_kept, -torch.inf)
        return replace(self, demoted=Kept.top(p, score, p.valid.sum(-1, dtype=torch.int32) - self.length))

    def with_state(self, state: StoreState) -> Kept:
        return replace(self, state=state)

    @property
    def parts(self) -> list[Kept]:
        """This set of tokens and those behind it."""
        return [self] if self.demoted is None else [self, *self.demoted.parts]

    def edges(self, sink: int, recent: int, ring: bool, layer_score: float = 0.0) -> Kept:
        """The text's first `sink` and last `recent` tokens, of a row whose heads all hold the same tokens.

        ring: a new token overwrites the oldest recent one, so the head stays at sink + recent; otherwise it grows.
        Sinks that have left the model's sliding window are no longer in the row and are not kept.
        """
        sink = max(0, sink - int(self.pos[0, 0, 0]))
        k, v, pos, n = self.k, self.v, self.pos, self.k.shape[2]
        if n > sink + recent:
            k, v, pos = (torch.cat((x[:, :, :sink], x[:, :, n - recent :]), 2) for x in (k, v, pos))
        ones = torch.ones_like(self.length)
        limit, protected = (sink + recent, sink) if ring else (-1, 0)
        return Kept(k, v, pos, ones * k.shape[2], ones * limit, ones * protected, layer_score=layer_score)


def _owned(x: Tensor) -> Tensor:
    """x in storage of its own: a view would keep a whole layer's projections alive behind a few kept tokens."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)
