"""The plain values between prefill and decode: what a policy sees of a prompt, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Prompt:
    """One layer of one prompt after its prefill attention, or what a cache still holds of it later. A policy never sees a batch."""

    layer: int
    rank: int  # this layer is the rank-th …
    owners: int  # … of so many with storage of their own
    seen: int  # tokens of text so far …
    visible: int  # … and how many of them the model's own window still shows the next one
    k: Tensor  # (1,Hkv,N,D) rotated
    v: Tensor  # (1,Hkv,N,D)
    pos: Tensor  # (1,Hkv,N) int32 absolute, ascending; −1 behind a head that holds fewer
    votes: Tensor | None  # (readers,Hkv,N) fp32, one plane per layer that reads these keys; or as `watch` left them
    n_votes: int  # from how many queries
    ops: Any  # the backend, to move what is kept
    q_mean: Tensor | None = None  # (readers,H,D) fp32, of queries before rotation
    q_cov: Tensor | None = None  # (readers,H,D,D)
    inv_freq: Tensor | None = None  # (D/2,) the rotation's angle per position
    codes: Mapping[str, Tensor] | None = None  # of what a store has rounded: see `Kept`

    def __len__(self) -> int:
        return self.k.shape[2]

    @property
    def real(self) -> Tensor:
        """bool (1,Hkv,N): a token, not padding."""
        return self.pos >= 0

    def first(self, n: int) -> Tensor:
        """bool (1,Hkv,N): the n first tokens of the text (the sinks), as far as they are still here."""
        return self.real & (self.pos < n)

    def last(self, n: int) -> Tensor:
        """bool (1,Hkv,N): the n most recent tokens of the text, as far as they are still here."""
        return self.pos >= max(0, self.seen - n)


@dataclass(frozen=True)
class Kept:
    """What survives of one row in one layer: a value that can be saved, packed twice or trimmed again.

    `rest` is demoted instead of dropped: a second set of tokens, to be held more coarsely. `codes` is how a store that rounds has written
    the same tokens down, for it alone to read, so that nothing is rounded twice: (1,Hkv,N,·) each, or, of a store whose tokens
    can only leave together, whatever it likes.
    """

    k: Tensor  # (1,Hkv,N,D)
    v: Tensor  # (1,Hkv,N,D)
    pos: Tensor  # (1,Hkv,N) int32, ascending, padded with −1 behind `length`
    length: Tensor  # (1,Hkv) int32: how many are real (heads may differ)
    limit: Tensor  # (1,Hkv) int32: slots a head may ever use; −1: grows with decode
    sink: Tensor  # (1,Hkv) int32: first slots that the default rule never overwrites
    votes: Tensor | None = None  # (1,Hkv,N) fp32, for policies that go on counting while decoding
    score: float = 0.0  # of the whole layer, for rules across layers
    rest: Kept | None = None
    codes: Mapping[str, Tensor] | None = None

    @classmethod
    def all(
        cls, p: Prompt, limit: int | Tensor = -1, sink: int = 0, votes: Tensor | None = None, score: float = 0.0
    ) -> Kept:
        """Every token of the prompt; votes (1,Hkv,N) go with them."""
        length = p.real.sum(-1, dtype=torch.int32)
        heads = torch.ones_like(length)
        return cls(_own(p.k), _own(p.v), _own(p.pos), length, heads * limit, heads * sink, votes, score, codes=p.codes)

    @classmethod
    def top(
        cls,
        p: Prompt,
        score: Tensor,
        n: int | Tensor,
        limit: int | Tensor = -1,
        sink: int | Tensor = 0,
        votes: Tensor | None = None,
    ) -> Kept:
        """The n best tokens of each head in temporal order; equal scores: the earlier token wins.

        score (1,Hkv,N), +inf for what must stay; n, limit, sink: one number, or (1,Hkv) where heads differ.
        """
        n = torch.as_tensor(n, dtype=torch.int32, device=score.device).expand(score.shape[:2])
        n = n.minimum(p.real.sum(-1, dtype=torch.int32))
        score = score.masked_fill(~p.real, -torch.inf)
        rank = score.argsort(dim=-1, descending=True, stable=True)[..., : int(n.max())]
        real = torch.arange(rank.shape[-1], device=n.device) < n[..., None]
        at = rank.masked_fill(~real, len(p)).sort(dim=-1).values
        real, at = at < len(p), at.clamp(max=len(p) - 1)
        k, v, pos = p.ops.compact(p.k, p.v, p.pos, at.masked_fill(~real, -1))
        heads, votes = torch.ones_like(n), None if votes is None else votes.gather(2, at)
        return cls(k, v, pos, n.clone(), heads * limit, heads * sink, votes, codes=_pick(p.codes, at))

    def within(self, seen: int, sliding_window: int | None) -> Kept:
        """Without what a model with this window will not see again after `seen` tokens."""
        if sliding_window is None:
            return self
        gone = ((self.pos >= 0) & (self.pos <= seen - sliding_window)).sum(-1)  # of each head the first so many
        at = torch.arange(self.pos.shape[2], device=self.pos.device) + gone[..., None]
        real = at < self.length[..., None]
        at = at.masked_fill(~real, 0)
        row = at[..., None].expand_as(self.k)
        votes = None if self.votes is None else self.votes.gather(2, at)
        pos, length = self.pos.gather(2, at).masked_fill(~real, -1), self.length - gone.to(torch.int32)
        k, v, codes = self.k.gather(2, row), self.v.gather(2, row), _pick(self.codes, at)
        return replace(self, k=k, v=v, pos=pos, length=length, votes=votes, codes=codes)

    def demote(self, p: Prompt) -> Kept:
        """The same, with all other tokens of the prompt as `rest`."""
        mine = torch.nn.functional.pad(self.pos, (0, 1), value=-1)  # one more, as there may be none
        mine = torch.where(mine < 0, torch.iinfo(torch.int32).max, mine)
        at = torch.searchsorted(mine, p.pos.contiguous()).clamp(max=mine.shape[2] - 1)
        kept = mine.gather(2, at) == p.pos
        score = torch.zeros_like(p.pos, dtype=torch.float32).masked_fill(kept, -torch.inf)
        return replace(self, rest=Kept.top(p, score, p.real.sum(-1, dtype=torch.int32) - self.length))

    @property
    def parts(self) -> list[Kept]:
        """The sets it consists of."""
        return [self] if self.rest is None else [self, *self.rest.parts]

    def edges(self, sink: int, recent: int, roll: bool, score: float = 0.0) -> Kept:
        """The text's first `sink` and last `recent` tokens, of a row whose heads hold the same ones.

        roll: new tokens overwrite the oldest recent one, so the head stays at sink + recent; else it grows.
        Sinks that the model's sliding window has passed are not there to be kept.
        """
        sink = max(0, sink - int(self.pos[0, 0, 0]))
        k, v, pos, n = self.k, self.v, self.pos, self.k.shape[2]
        if n > sink + recent:
            k, v, pos = (torch.cat((x[:, :, :sink], x[:, :, n - recent :]), 2) for x in (k, v, pos))
        heads = torch.ones_like(self.length)
        limit, protected = (sink + recent, sink) if roll else (-1, 0)
        return Kept(k, v, pos, heads * k.shape[2], heads * limit, heads * protected, score=score)


def _pick(codes: Mapping[str, Tensor] | None, at: Tensor) -> Mapping[str, Tensor] | None:
    """The codes of the tokens at (1,Hkv,N)."""
    if codes is None:
        return None
    return {name: x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3])) for name, x in codes.items()}


def _own(x: Tensor) -> Tensor:
    """x in storage of its own: a view would keep the whole layer's projections alive behind a few kept tokens."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)
