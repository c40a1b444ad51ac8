"""The two loops: prefill a prompt through a `PromptCache`, then decode on a `KVCache`. This module deals in token ids
only; it knows no strings, no method and no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.backends.base import Ops
from nanokv.cache.context import Context
from nanokv.cache.decode import KVCache
from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache
from nanokv.cache.report import Report, ScoringPasses
from nanokv.device import wait_for
from nanokv.model.llama import Llama
from nanokv.policies.base import Policy
from nanokv.runner import Runner

TURN_CHUNK = 512  # tokens of a turn that are fed at once
SHARED_AT_LEAST = 64  # shorter prefixes are stored in each row, which saves a second read at every step


@dataclass(frozen=True)
class Models:
    """One set of weights in the dtype that suits many tokens at once (prompts and turns) and in the one that suits single
    tokens; often the same object.
    """

    prefill: Llama
    decode: Llama
    ops: Ops
    runner: Runner  # runs the decode steps
    cache_dtype: torch.dtype | None = None  # of keys and values; None: that of `decode`
    token_kinds: Callable[[], Tensor] | None = None  # for `Context`, as is the next
    encode: Callable[[str], Sequence[int]] | None = None

    def new_context(self) -> Context:
        """What a cache needs to know of the model and the device, for one session: its constants are its own."""
        model, weight = self.decode, self.decode.embed_tokens.weight
        return Context(
            model.config,
            self.ops,
            weight.device,
            self.cache_dtype or weight.dtype,
            model.inv_freq,
            output_weights=self.prefill.output_weights(),  # many values are multiplied at once, as in a prompt
            token_kinds=self.token_kinds,
            encode=self.encode,
        )


def prefill(
    model: Llama, cache: PromptCache, chunk: int | None = None, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Feed the prompt of `cache`, whole or in chunks, and the policy's scoring passes → logits of the prompt's last
    token (1,vocab).

    Afterwards `cache.kept` holds what stays; under a policy with `decide_after`, only after that many more tokens
    went through it. `progress(n)` is called after every n tokens, also of scoring passes.
    """
    ids, policy = cache.ids, cache.plan.policy
    step = chunk or len(ids)
    for a in range(cache.n_given, len(ids), step):
        hidden = _feed(model, cache, ids[a : a + step], a)
        if progress:
            progress(min(step, len(ids) - a))
    logits = model.logits(hidden[:, -1])
    if cache.n_passes:
        wait_for(ids.device)
        t0, held, n = time.perf_counter(), cache.dense_bytes, 0
        for i, replay in enumerate(replays(policy, ids, cache.ctx)):
            cache.begin_pass(len(replay), policy.scored(len(ids), i))
            for a in range(0, len(replay), step):
                _feed(model, cache, replay[a : a + step], len(ids) + a)
                if progress:
                    progress(min(step, len(replay) - a))
            n += len(replay)
        wait_for(ids.device)
        cache.passes_cost = ScoringPasses(n, time.perf_counter() - t0, held)
    return logits


def replays(policy: Policy, ids: Tensor, ctx: Context) -> list[Tensor]:
    """The token ids of each scoring pass that a fitted policy asks for after the prompt ids (T,)."""
    return [policy.replay(ids, i, ctx.token_ids) for i in range(policy.passes(len(ids)))]


def _feed(model: Llama, cache: PromptCache, tokens: Tensor, start: int) -> Tensor:
    """tokens (n,) of one row at positions start … → hidden states (1,n,C)."""
    pos = torch.arange(start, start + len(tokens), device=tokens.device)[None]
    return model.hidden(tokens[None], pos, cache, cache.run_block if cache.wants_similarity else None)


class Session:
    """Token sequences in progress, one per row, on one compressed cache that later turns continue."""

    def __init__(self, models: Models, plan: Plan, room: int, chunk: int | None = None):
        """room: tokens that will follow the prompt. chunk: tokens of a prompt or turn per forward pass; None: a
        prompt whole, a turn by TURN_CHUNK.
        """
        self.models, self.plan, self.room, self.chunk = models, plan, room, chunk
        self.context = models.new_context()
        self.undecided: list[PromptCache] = []  # prompts whose policy has not decided yet (`decide_after`)
        self.cache: KVCache | None = None
        self.pos: Tensor | None = None  # (B,1): the position of each row's next token
        self.seen: list[int] = []  # the same positions as Python numbers: how long each row's text is
        self.plans: list[Plan] = []  # the plan as fitted to each row's prompt
        self.passes: list[ScoringPasses] = []  # the cost of the scoring passes, for each prompt that had any
        # only policies that rescore need the token ids of the text
        # each row's ids up to the last rescore; None if a loaded cache lacks them
        self.tokens: list[Tensor] | None = []
        self.fed: list[Tensor] = []  # (B,T) each: the ids fed since then
        self.n_tried = 0  # how many tokens of `try_tokens` wait for `accept`
        self.is_searched = False  # True once a beam search has left the rows with texts that are not the answer
        self.intact = True  # False if an exception interrupted a step, so the cache may be half written

    def fitted_plan(self, prompt_len: int, rows: int = 1) -> Plan:
        """The plan fitted to a prompt of this length, or to the first row's prompt if the session has one."""
        if self.plans:
            return self.plans[0]
        return self.plan.fit(self.models.prefill.config, self.context.dtype, prompt_len, self.room, rows)

    def pass_lengths(self, prompt: Sequence[int], rows: int = 1) -> list[int]:
        """How many tokens each of the scoring passes feeds that the policy asks for after this prompt."""
        policy = self.plan.fit(self.models.prefill.config, self.context.dtype, len(prompt), self.room, rows).policy
        ids = torch.tensor(prompt, device=self.context.device)
        return [len(tokens) for tokens in replays(policy, ids, self.context)]

    @torch.inference_mode()
    def start(
        self, prompts: Sequence[Sequence[int]], copies: int = 1, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Prefill one prompt after the other → logits (B,vocab), B = prompts × copies. Copies share one prefill,
        unless the policy decides only after later tokens (`decide_after`).
        """
        config, device = self.models.prefill.config, self.context.device
        n = len(prompts) * copies
        logits, caches, shared = [], [], self.shared_tokens(prompts, copies)
        for prompt in prompts:
            plan = self.plan.fit(config, self.context.dtype, len(prompt), self.room, n)
            ids = torch.tensor(prompt, device=device)
            # copies share one prefill, but an undecided prompt goes on differently for each of them
            alike = 1 if plan.policy.decide_after else copies
            for _ in range(copies // alike):
                cache = PromptCache(plan, ids, self.context)
                if shared and caches:
                    cache.begin_with(caches[0].kept, shared)
                    if progress:
                        progress(shared)
                out = prefill(self.models.prefill, cache, self.chunk, progress)
                self.passes += [cache.passes_cost] if cache.passes_cost else []
                if shared and caches:  # the first row holds the prefix
                    cache.kept = {i: kept.since(shared) for i, kept in cache.kept.items()}
                logits += [out] * alike
                caches += [cache] * alike
            self.plans += [plan] * copies
            self.seen += [len(prompt)] * copies
            self.tokens += [ids] * copies
        self.pos = torch.tensor(self.seen, device=device)[:, None]
        if self.plans[0].policy.decide_after:
            self.undecided = caches
        else:
            self._pack(caches, shared)
        return torch.cat(logits)

    def shared_tokens(self, prompts: Sequence[Sequence[int]], copies: int = 1) -> int:
        """How many first tokens all rows share: they are computed and stored once. 0 if these would be few, or if a row
        may lose one of them, or rounds them together with later ones.
        """
        policy, config = self.plan.policy, self.models.prefill.config
        grows = policy.eviction == "none" and not (policy.rescore_every or policy.decode_request or policy.decide_after)
        if len(prompts) * copies == 1 or not grows or config.has_windows or policy.positions_by_chunk:
            return 0
        n = len(prompts[0])
        if len(prompts) > 1:
            if not policy.keeps_prefix:
                return 0
            pairs = enumerate(zip(*prompts, strict=False))
            n = next((i for i, tokens in pairs if len(set(tokens)) > 1), min(map(len, prompts)) - 1)
        divides = self.plan.store.behind_prefix(n if policy.keeps_prefix else 0)
        return n if n >= SHARED_AT_LEAST and divides else 0

    def restore(self, plan: Plan, kept: dict[int, Kept], seen: int, tokens: Tensor | None = None) -> None:
        """Go on from what one row has kept (layer → Kept), instead of `start`. tokens (seen,): the text's ids, where
        they are known.
        """
        self.plans, self.seen, self.tokens = [plan], [seen], None if tokens is None else [tokens]
        self.pos = torch.tensor([[seen]], device=self.context.device)
        self.cache = KVCache.pack([plan], [kept], self.room, self.context)

    def _pack(self, caches: list[PromptCache], shared: int = 0) -> None:
        rows = [dict(c.kept) for c in caches]
        for c in caches:
            c.kept = {}  # only `rows` refers to the tensors now, so `pack` can free them layer by layer
        self.cache = KVCache.pack(self.plans, rows, self.room, self.context, shared)

    @torch.inference_mode()
    def feed(self, tokens: Tensor, every_logit: bool = False) -> Tensor:
        """(B,T) new tokens → logits after the last of them (B,vocab), or after every one (B,T,vocab)."""
        if not self.undecided:
            self.cache.check_room(tokens.shape[1])
        self.intact = False
        if self.plan.policy.rescore_every:
            self.fed.append(tokens)
        parts, tokens = self._feed_undecided(tokens) if self.undecided else ([], tokens)
        if parts and tokens.shape[1]:
            self.cache.check_room(tokens.shape[1])
        while tokens.shape[1]:
            T = self.cache.next_piece(tokens.shape[1], self.seen)
            self.cache.room -= T  # before the step, so that an interrupted one leaves no room for what it wrote
            pos = self.pos if T == 1 else self.pos + torch.arange(T, device=self.pos.device)
            if T == 1:
                out = self.models.runner.step(tokens[:, :1], pos, self.cache)[:, None]
            else:
                hidden = self.models.prefill.hidden(tokens[:, :T], pos, self.cache)
                out = self.models.prefill.logits(hidden if every_logit else hidden[:, -1:])
            tokens = tokens[:, T:]
            if every_logit or not tokens.shape[1]:
                parts.append(out)
            self._advance(T)
            self.cache.maintain(T, self.seen, self._tokens_seen)
        self.intact = True
        return torch.cat(parts, 1) if every_logit else parts[-1][:, -1]

    def feed_turn(self, tokens: Tensor) -> Tensor:
        """`feed` in chunks that bound the memory; each is stored before the next one attends."""
        for chunk in tokens.split(self.chunk or TURN_CHUNK, 1):
            logits = self.feed(chunk)
        return logits

    @torch.inference_mode()
    def try_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B,T) that may turn out wrong → logits after every one (B,T,vocab). They attend to the text and to those
        tried before. `accept` ends the trial; until then the session is not intact.
        """
        self.intact = False
        self.cache.defer()
        n, T = self.n_tried, tokens.shape[1]
        pos = self.pos + torch.arange(n, n + T, device=self.pos.device)
        out = self.models.prefill.logits(self.models.prefill.hidden(tokens, pos, self.cache))
        self.n_tried += T
        return out

    @torch.inference_mode()
    def accept(self, n: int) -> None:
        """The first n of the tried tokens belong to the text, and the others are forgotten."""
        if not self.n_tried:
            return
        self.cache.check_room(n)
        while n:
            T = self.cache.next_piece(n, self.seen)
            self.cache.room -= T
            self.cache.store_deferred(T, self.pos + torch.arange(T, device=self.pos.device))
            self._advance(T)
            self.cache.maintain(T, self.seen)
            n -= T
        self.cache.release()
        self.n_tried = 0
        self.intact = True

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on from what row rows[i] holds. All rows must have texts of one length."""
        if list(rows) == list(range(len(rows))):
            return
        self.cache.reorder(rows)
        if self.tokens is not None:
            self.tokens = [self.tokens[i] for i in rows]
        self.fed = [tokens[list(rows)] for tokens in self.fed]

    def _tokens_seen(self) -> list[Tensor] | None:
        """Each row's token ids so far; the cache asks for them only at a rescore."""
        if self.tokens is None:
            return None
        new, self.fed = self.fed, []
        self.tokens = [torch.cat((ids, *(x[b] for x in new))) for b, ids in enumerate(self.tokens)]
        return [ids[:n] for ids, n in zip(self.tokens, self.seen, strict=True)]

    def _feed_undecided(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feed the first tokens, which the policy counts as prompt. Return the logits (B,1,vocab) after each, and the other
        tokens.
        """
        parts, n = [], min(self.plans[0].policy.decide_after, tokens.shape[1])
        for i in range(n):
            pos, column = self.pos.clone(), tokens[:, i : i + 1]
            out = []
            for b, cache in enumerate(self.undecided):
                cache.ids = torch.cat((cache.ids, column[b]))
                out.append(self.models.prefill(column[b : b + 1], pos[b : b + 1], cache))
            parts.append(torch.cat(out)[:, None])
            self._advance(1)
        if all(c.length == seen for c, seen in zip(self.undecided, self.seen, strict=True)):
            caches, self.undecided = self.undecided, []
            self._pack(caches)
            self.cache.room -= n
        return parts, tokens[:, n:]

    def _advance(self, n: int) -> None:
        self.pos += n
        self.seen = [s + n for s in self.seen]

    def reserve(self, room: int) -> None:
        """Make room for `room` more tokens from here on."""
        if self.cache is None:
            self.room = max(self.room, room)
        else:
            self.cache.reserve(room)

    def report(self) -> Report | None:
        """The receipt; None while a policy has not decided yet."""
        return None if self.cache is None else self.cache.report(self.seen)


def generate(session: Session, logits: Tensor, n: int, sampler: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Up to n columns (B,) of tokens: the first sampled from `logits`, each other from the logits that follow.

    The caller stops when it has enough. The last column is not fed to the cache; a later turn does that.
    """
    for i in range(n):
        tokens = sampler(logits)
        yield tokens
        if i + 1 < n:
            logits = session.feed(tokens[:, None])
