"""The two loops: prefill a prompt through a `PromptCache`, then decode on a `KVCache`. Deals in token ids only; knows no text,
no method and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.cache.decode import KVCache
from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache
from nanokv.cache.protocol import Context
from nanokv.cache.report import Report
from nanokv.model.llama import Llama
from nanokv.runner import Runner


@dataclass(frozen=True)
class Models:
    """One set of weights in the type that suits prompts and in the one that suits single tokens; often the same object."""

    prefill: Llama
    decode: Llama
    ops: Ops
    runner: Runner  # of single tokens

    @property
    def context(self) -> Context:
        weight = self.decode.embed_tokens.weight
        return Context(self.decode.config, self.ops, weight.device, weight.dtype, self.decode.inv_freq)


def prefill(
    model: Llama, cache: PromptCache, chunk: int | None = None, tick: Callable[[int], None] | None = None
) -> Tensor:
    """The prompt that `cache` was made for, whole or in chunks → logits of its last token (1,vocab).

    Afterwards the cache's `kept` holds what stays; under a policy that waits, only after that many more tokens went through it.
    `tick(n)` is told of every n tokens done.
    """
    ids = cache.ids
    step = chunk or len(ids)
    for a in range(0, len(ids), step):
        tokens = ids[None, a : a + step]
        pos = torch.arange(a, a + tokens.shape[1], device=ids.device)[None]
        hidden = model.hidden(tokens, pos, cache)
        if tick:
            tick(tokens.shape[1])
    return model.logits(hidden[:, -1])


class Session:
    """Texts in progress, one per row, on one compressed cache that later turns continue."""

    def __init__(self, models: Models, plan: Plan, room: int, chunk: int | None = None):
        self.models, self.plan, self.room, self.chunk = models, plan, room, chunk
        self.context = models.context
        self.open: list[PromptCache] = []  # prompts whose policy still waits
        self.cache: KVCache | None = None
        self.pos: Tensor | None = None  # (B,1): where the next token of each row goes
        self.seen: list[int] = []  # the same on the host
        self.plans: list[Plan] = []  # the plan as fitted to each row's prompt
        self.whole = True  # False: an exception left a step half done, and the cache with it

    @torch.inference_mode()
    def start(
        self, prompts: Sequence[Sequence[int]], copies: int = 1, tick: Callable[[int], None] | None = None
    ) -> Tensor:
        """Prefill one prompt after the other → logits (B,vocab), B = prompts × copies. Copies share one prefill."""
        config, device = self.models.prefill.config, self.context.device
        n = len(prompts) * copies
        logits, caches = [], []
        for ids in prompts:
            plan = self.plan.fit(config, self.context.dtype, len(ids), self.room, n)
            again = copies if plan.keep.wait else 1  # a waiting prompt goes on differently for each copy
            for _ in range(again):
                cache = PromptCache(plan, config, torch.tensor(ids, device=device), self.models.ops, self.context)
                out = prefill(self.models.prefill, cache, self.chunk, tick)
                logits += [out] * (copies // again)
                caches += [cache] * (copies // again)
            self.plans += [plan] * copies
            self.seen += [len(ids)] * copies
        self.pos = torch.tensor(self.seen, device=device)[:, None]
        if self.plans[0].keep.wait:
            self.open = caches
        else:
            self._pack(caches)
        return torch.cat(logits)

    def restore(self, plan: Plan, kept: dict[int, Kept], seen: int) -> None:
        """Go on from survivors of one row that were kept somewhere, instead of `start`."""
        self.plans, self.seen = [plan], [seen]
        self.pos = torch.tensor([[seen]], device=self.context.device)
        self.cache = KVCache.pack([plan], [kept], self.room, self.context)

    def _pack(self, caches: list[PromptCache]) -> None:
        rows = [dict(c.kept) for c in caches]
        for c in caches:
            c.kept = {}  # the rows own the survivors now, and pack takes them out of there
        self.cache = KVCache.pack(self.plans, rows, self.room, self.context)

    @torch.inference_mode()
    def feed(self, tokens: Tensor, each: bool = False) -> Tensor:
        """(B,T) new tokens → logits after the last of them (B,vocab), or after every one (B,T,vocab)."""
        if not self.open:
            self.cache.expect(tokens.shape[1])
        self.whole = False
        parts = self._feed_open(tokens) if self.open else []
        tokens = tokens[:, len(parts) :]
        if parts and tokens.shape[1]:
            self.cache.expect(tokens.shape[1])
        while tokens.shape[1]:
            T = self.cache.piece(tokens.shape[1])
            self.cache.room -= T
            pos = self.pos if T == 1 else self.pos + torch.arange(T, device=self.pos.device)
            if T == 1:
                out = self.models.runner.step(tokens[:, :1], pos, self.cache)[:, None]
            else:
                hidden = self.models.prefill.hidden(tokens[:, :T], pos, self.cache)
                out = self.models.prefill.logits(hidden if each else hidden[:, -1:])
            tokens = tokens[:, T:]
            if each or not tokens.shape[1]:
                parts.append(out)
            self._advance(T)
            self.cache.maintain(T, self.seen)
        self.whole = True
        return torch.cat(parts, 1) if each else parts[-1][:, -1]

    def _feed_open(self, tokens: Tensor) -> list[Tensor]:
        """The first tokens, as far as a waiting policy still counts them to the prompt → the logits after each (B,1,vocab)."""
        parts, n = [], min(self.plans[0].keep.wait, tokens.shape[1])
        for i in range(n):
            pos, column = self.pos.clone(), tokens[:, i : i + 1]
            out = []
            for b, cache in enumerate(self.open):
                cache.ids = torch.cat((cache.ids, column[b]))
                out.append(self.models.prefill(column[b : b + 1], pos[b : b + 1], cache))
            parts.append(torch.cat(out)[:, None])
            self._advance(1)
        if all(c.length == c_seen for c, c_seen in zip(self.open, self.seen, strict=True)):
            caches, self.open = self.open, []
            self._pack(caches)
            self.cache.room -= n
        return parts

    def _advance(self, n: int) -> None:
        self.pos += n
        self.seen = [s + n for s in self.seen]

    def reserve(self, room: int) -> None:
        """Slots for `room` more tokens from here on."""
        if self.cache is None:
            self.room = max(self.room, room)
        else:
            self.cache.reserve(room)

    def report(self) -> Report | None:
        """The receipt; None while a policy still waits for its first token."""
        return None if self.cache is None else self.cache.report(self.seen)


def generate(session: Session, logits: Tensor, n: int, sampler: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Up to n columns (B,) of tokens, sampled from `logits` and then from what follows. The caller stops when it has enough;
    the last column is not fed to the cache until a later turn does.
    """
    for i in range(n):
        tokens = sampler(logits)
        yield tokens
        if i + 1 < n:
            logits = session.feed(tokens[:, None])
