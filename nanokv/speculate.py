"""Speculative decoding: guess the next tokens cheaply, and check all guesses in one pass of the model.

Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). The text is one that the model alone
would write: the same tokens if greedy, the same distribution otherwise. A guess, the draft, comes from the text itself
(`Lookup`) or from a second session (`SecondSession`): the same model under a plan that reads less, or a smaller model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from nanokv.cache.plan import Plan, nearest, parse
from nanokv.engine import Session
from nanokv.text.sampler import Sampling, draw, finite, probabilities, sample

LOOKUP = "lookup"


class Draft(Protocol):
    name: str

    def begin(self, text: list[int], is_new: bool, room: int, sampling: Sampling, generator: torch.Generator) -> None:
        """Get ready for a text that begins with these tokens and goes on for at most `room` more. is_new: it does not
        continue the text of the last call.
        """

    def propose(self, text: list[int], n: int, vocab: int) -> tuple[list[int], Tensor]:
        """At most n tokens that may follow the text, and the distributions (n,vocab) that they were drawn from."""

    def cache_bytes(self) -> int:
        """What the draft's own cache takes."""


class Lookup:
    """Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): where the text's last tokens
    stood before, the tokens that followed them are the draft. Of at most `ngram` last tokens as many as possible count,
    and of several places the last one. Deviation: the author takes the first place.
    """

    name = LOOKUP

    def __init__(self, ngram: int = 3):
        if ngram < 1:
            raise ValueError(f"ngram is {ngram}; give how many last tokens are looked up, at least 1")
        self.ngram = ngram

    def begin(self, text: list[int], is_new: bool, room: int, sampling: Sampling, generator: torch.Generator) -> None:
        """The text itself is all that is needed."""

    def propose(self, text: list[int], n: int, vocab: int) -> tuple[list[int], Tensor]:
        ids, found = torch.tensor(text), torch.tensor([], dtype=torch.long)
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            places = (ids[:-1].unfold(0, size, 1) == ids[-size:]).all(-1).nonzero()
            if len(places):
                after = int(places[-1]) + size
                found = ids[after : after + n]
                break
        return found.tolist(), one_hot(found, vocab).float()

    def cache_bytes(self) -> int:
        return 0


class SecondSession:
    """A second session over the same text writes the draft, token by token."""

    def __init__(self, name: str, plan: Plan, start: Callable[[list[int], int], Session]):
        """start(text, room): a session under the plan that holds the text, with room for more tokens."""
        self.name, self.start = name, start
        self.session: Session | None = None
        self.tried: list[int] = []  # what the session was given, and holds only if it turns out right
        self.is_whole = True  # False if an exception interrupted a draft

    def begin(self, text: list[int], is_new: bool, room: int, sampling: Sampling, generator: torch.Generator) -> None:
        self.sampling, self.generator = sampling, generator
        if is_new or not self.is_whole:
            self.session, self.tried, self.is_whole = self.start(text, room), [], True
        else:
            self.session.reserve(len(text) - self.session.seen[0] + room)

    def propose(self, text: list[int], n: int, vocab: int) -> tuple[list[int], Tensor]:
        session, found, q = self.session, [], []
        vocab_here = session.models.decode.config.vocab_size
        if max(text[session.seen[0] :]) >= vocab_here:  # a token that this model does not have
            return [], torch.zeros(0, vocab)
        self.is_whole = False
        pairs = zip(self.tried, text[session.seen[0] :], strict=False)
        session.accept(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))
        new = text[session.seen[0] :]
        if len(new) > 2:  # the turn of a conversation
            session.feed_turn(self._row(new[:-2]))
        self.tried = new[-2:]
        logits = session.try_tokens(self._row(self.tried))
        while True:
            q.append(probabilities(finite(logits[:, -1, :vocab]), self.sampling))
            found.append(int(draw(q[-1], self.generator)))
            if len(found) == n:
                break
            self.tried.append(found[-1])
            logits = session.try_tokens(self._row(found[-1:]))
        self.is_whole = True
        return found, pad(torch.cat(q), (0, max(0, vocab - vocab_here)))  # one vocabulary may be padded differently

    def cache_bytes(self) -> int:
        return self.session.report().bytes

    def _row(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.session.pos.device)


def check_plans(checks: Plan, writes: Plan | None) -> None:
    """ValueError if a session under the one plan cannot check drafts, or one under the other cannot write them."""
    if reason := why_not(checks):
        names = "+".join(checks.names)
        raise ValueError(f"{names} cannot check drafts: it {reason}; use another plan, or no draft")
    if writes and (reason := why_not(writes, checks=False)):
        raise ValueError(f"{'+'.join(writes.names)} cannot write drafts: it {reason}; use another plan for --draft")


def draft_plan(draft: str) -> Plan | None:
    """The plan of a second session that writes drafts; None for lookup. ValueError if it is neither."""
    if draft == LOOKUP:
        return None
    try:
        return parse(draft)
    except ValueError as e:
        if hint := nearest(draft, [LOOKUP]):
            raise ValueError(f"unknown draft {draft!r}{hint}; give {LOOKUP}, or a plan") from None
        raise ValueError(f"a draft is {LOOKUP}, or written under a plan, and {e}") from None


def why_not(plan: Plan, checks: bool = True) -> str:
    """Why a session under this plan cannot check drafts, or with checks=False cannot write them: the end of a sentence.
    Empty if it can.
    """
    policy = plan.policy
    if policy.decode_request:
        return "scores its tokens at every step"
    if policy.rescore_every:
        return "scores its tokens again, by queries that may turn out wrong"
    if policy.positions_by_chunk:
        return "gives keys other positions for each query, and a draft may reach over the end of a chunk"
    if policy.decide_after:
        return "decides after the first new token"
    if checks and policy.eviction != "none":
        return "evicts a token at every step, and a pass over several tokens would see all of them"
    if checks and plan.store.selects_per_step:
        return "lets every step choose what it reads, and a pass over several tokens reads everything"
    if checks and plan.store.state_type is not None:
        return "rounds every token that it stores, and a pass over several tokens sees the newest ones exact"
    return ""


def check_draft(draft: list[int], q: Tensor, p: Tensor, generator: torch.Generator) -> list[int]:
    """The tokens of the draft up to the first one that is rejected, and one more (arXiv:2211.17192, algorithm 1).

    q (n,vocab): the distributions that the draft's n tokens were drawn from. p (n+1,vocab): the model's own.
    """
    index = torch.tensor(draft, dtype=torch.long, device=p.device)[:, None]
    chance = torch.rand(len(draft), 1, generator=generator, device=p.device)
    accepted = chance * q.gather(1, index) < p[:-1].gather(1, index)
    n = int(accepted.long().cumprod(0).sum())
    rest = p[n] if n == len(draft) else (p[n] - q[n]).clamp(min=0)
    return [*draft[:n], int(draw(rest[None], generator))]


class Speculation:
    """The drafts for one session of one row, and how often they were right."""

    def __init__(self, draft: Draft, tokens: int = 4):
        """tokens: how many a draft may have."""
        if tokens < 1:
            raise ValueError(f"a draft of {tokens} tokens is none; give at least 1")
        self.draft, self.tokens = draft, tokens
        self.text: list[int] = []
        self.first = 0  # the position of the text's first token in the session
        self.session: Session | None = None
        self.passes = self.drafted = self.accepted = 0  # of one answer

    def begin(
        self, session: Session, new: Sequence[int], room: int, sampling: Sampling, generator: torch.Generator
    ) -> None:
        """The session will take the tokens `new`, and then at most `room` more. Where the text before them is not known,
        because another session or an answer without drafts came in between, the drafts are of what follows.
        """
        before = session.seen[0] if session.seen else 0
        is_known = session is self.session and before <= self.first + len(self.text)
        self.first = self.first if is_known else before
        self.text = [*self.text[: before - self.first], *new]
        self.session, self.sampling, self.generator = session, sampling, generator
        self.passes = self.drafted = self.accepted = 0
        self.draft.begin(self.text, not is_known, room, sampling, generator)

    def generate(self, session: Session, logits: Tensor, n: int) -> Iterator[Tensor]:
        """As `engine.generate`. If the caller stops early, the cache forgets the tokens that it did not take."""
        new, vocab = sample(finite(logits), self.sampling, self.generator).tolist(), logits.shape[-1]
        while True:
            taken = 0
            try:
                for token in new:
                    taken += 1
                    self.text.append(token)
                    yield torch.tensor([token])
            finally:
                session.accept(min(taken, session.n_tried))  # the tried ones begin with the token before `new`
            n -= len(new)
            if not n:
                return
            new = self._next_tokens(session, n, vocab)

    def _next_tokens(self, session: Session, n: int, vocab: int) -> list[int]:
        """Between one and n tokens."""
        # within a piece nothing is due in the store
        n = session.cache.next_piece(min(n, self.tokens + 1), session.seen) - 1
        draft, q = self.draft.propose(self.text, n, vocab) if n else ([], None)
        fed = torch.tensor([[self.text[-1], *draft]], device=session.pos.device)
        if draft:
            p = probabilities(finite(session.try_tokens(fed)[0]), self.sampling)
            new = check_draft(draft, q.to(p.device), p, self.generator)
        else:
            new = sample(finite(session.feed(fed)), self.sampling, self.generator).tolist()
        self.passes += 1
        self.drafted += len(draft)
        self.accepted += len(new) - 1
        return new
