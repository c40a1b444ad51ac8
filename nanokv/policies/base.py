"""What every policy is: which tokens of a layer's prompt stay, and which token makes room for a new one while
decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.budget import Workload
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.cache.slots import Slots


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Which tokens of a layer stay. A frozen record of hyper-parameters without tensors; one instance serves every
    layer.

    The fields of a subclass are the options that a user can set. What a policy declares about itself are class
    attributes, or properties where it depends on an option; they are not annotated here, as that would make them
    fields. No option may have the name of a declaration (a test checks this).

    request               which statistics of the prompt's attention `keep` wants.
    second_request        a second one, whose scores come as `Prompt.second_attention`; None: there is none.
    rescore_request       replaces `request` when the policy is asked again while decoding; by default `request` itself.
    decode_request        how each decode step's attention is reduced for `update_scores` (`last_queries` has no meaning
                          here); None: decode steps are not scored.
    eviction              what makes room for a new token. none: nothing does, and heads grow. ring: a head with a
                          limit overwrites its oldest token behind the sinks. score: a new token takes the slot of the
                          lowest of `slot_scores`.
    rescore_every         tokens between two calls of `keep` on what is held while decoding; 0: never.
    decide_after          how many tokens after the prompt still attend to all of it before `keep` is called.
    cross_layer           whether `keep_all` is called once for all layers, instead of `keep` for each. Until then the
                          keys and values of the whole prompt stay in memory.
    refit_queries         how many of the prompt's last queries come as `Prompt.queries`.
    wants_similarity      whether `Prompt.similarity` is wanted.
    wants_token_kinds     whether `Prompt.token_kinds` is wanted.
    protected_sinks       how many of the text's first tokens are never evicted.
    positions_in_cache    whether positions count places in the cache (StreamingLLM) instead of places in the text.
    positions_by_chunk    whether a query reads the keys of each chunk of `chunk_size` tokens after a rotation of its own,
                          which `shift` tells. For policies that keep all tokens.
    keeps_all_or_edges    whether a layer keeps either the whole prompt or its first and last tokens only.
    keeps_prefix          whether what stays of the text's first tokens is the same whatever follows them.
    demotes               whether evicted tokens go on as `Kept.demoted`, at lower precision.
    low_bits              how many bits the low-precision tier must have; 0: any number.
    scores_once           whether a token that was once kept or demoted is never scored again.
    default_store         the store of a plan that names none.
    """

    request = ScoreRequest()
    second_request = None
    decode_request = None
    eviction = "none"
    rescore_every = 0
    decide_after = 0
    cross_layer = False
    refit_queries = 0
    wants_similarity = wants_token_kinds = False
    protected_sinks = 0
    positions_in_cache = False
    positions_by_chunk = False
    chunk_size = 0
    keeps_all_or_edges = False
    keeps_prefix = False
    demotes = False
    low_bits = 0
    scores_once = False
    default_store = "dense"

    @property
    def rescore_request(self) -> ScoreRequest:
        return self.request

    @property
    def evicts_out_of_order(self) -> bool:
        """Whether tokens other than a ring's oldest leave while decoding."""
        return bool(self.rescore_every or self.decode_request) or self.eviction == "score"

    def fit(self, work: Workload) -> Policy:
        """Turn percentages, bytes and per-family thresholds into numbers. ValueError if that is impossible."""
        return self

    def with_budget(self, budget: int | str) -> Policy:
        """This policy under a kept budget (`--kv-budget`). ValueError if it has none."""
        raise ValueError("this policy takes no budget; give one that does, such as --policy snapkv, or auto")

    def max_kept(self, n: int) -> int:
        """For memory estimates, on a fitted policy: how many of n tokens a KV head keeps at most, on average over heads and
        layers.
        """
        return n

    @abstractmethod
    def keep(self, p: Prompt) -> Kept:
        """What stays of one layer of one prompt; at a rescore, of what a layer holds."""

    def keep_all(self, prompts: list[Prompt]) -> list[Kept]:
        """What stays of every layer that owns storage, in their order: for budgets and choices across layers."""
        return [self.keep(p) for p in prompts]

    def passes(self, prompt_len: int) -> int:
        """How many forward passes follow that of the prompt only to score it. Attention scores then come from the queries of
        these passes instead of the prompt's, and their keys are dropped.
        """
        return 0

    def replay(self, tokens: Tensor, i: int, encode: Callable[[str], Tensor]) -> Tensor:
        """The token ids (n,) of scoring pass i, fed behind the prompt's tokens (T,). The default repeats the prompt.

        encode turns a text into token ids; without a tokenizer into none.
        """
        return tokens

    def scored(self, prompt_len: int, i: int) -> Sequence[tuple[int, int]] | None:
        """The runs (first, end) of the prompt's tokens, ascending, without overlap, that share the softmax of pass i with
        the pass itself; None: all tokens.
        """
        return None

    def shift(self, pos: Tensor, first: int) -> Tensor:
        """How many positions the queries at pos (B,T) are rotated by before they read the chunk of keys that begins at
        position `first`. Only asked under `positions_by_chunk`.
        """
        return torch.zeros_like(pos)

    def slot_scores(self, s: Slots, pos: Tensor) -> Tensor:
        """(B,Hkv,S): the slot of the lowest score goes to the token at pos (B,1), once no slot is free; +inf for slots
        that must stay. Only asked if `eviction` is "score"; by default what `update_scores` has returned.
        """
        return s.running_scores

    def step_request(self, n_tokens: int) -> ScoreRequest | None:
        """`decode_request` for a single new token. None for several, because a turn is not scored."""
        return self.decode_request if n_tokens == 1 else None

    def update_scores(self, s: Slots, attention: Tensor, pos: Tensor) -> Tensor:
        """attention (readers,B,Hkv,n): scores of the first n slots by the queries at pos (B,1) → the new
        `s.running_scores` of these slots.

        In each decode step every owning layer calls this when its last reader has attended, if `decode_request` is
        given.
        """
        return attention.sum(0)
