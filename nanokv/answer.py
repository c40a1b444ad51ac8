"""One answer while it is generated: decode steps, stop strings, timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch

from nanokv.beam import search
from nanokv.device import wait_for
from nanokv.engine import Session, generate
from nanokv.speculate import Speculation
from nanokv.text import tokenizer
from nanokv.text.sampler import NOT_FINITE, Sampling, finite_rows, sample
from nanokv.text.stream import Stopper, Stream


@dataclass
class Answer:
    """An answer while it is generated. Iterate for (row, piece of text); afterwards the fields say what happened."""

    session: Session
    tokenizer: tokenizer.Tokenizer
    limit: int
    sampling: Sampling
    generator: torch.Generator
    stop: tuple[str, ...]
    ignore_eos: bool
    speculation: Speculation | None = None
    beams: int = 1  # more than one: the session's rows are the beams of one text
    prompt_tokens: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens of each prompt that started the session
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    prefill_s: float = 0.0
    compile_s: float = 0.0
    decode_s: float = 0.0  # seconds of decode steps, except the first (a warm-up) and those that compiled
    counted: int = 0  # tokens generated within decode_s, without those of finished rows
    unfed: int | None = None  # row 0's last token, if the next turn must feed it first
    interrupted: bool = False  # may be set from outside at any time; the answer then ends after the step in progress
    score: float | None = None  # of the best beam: the mean of its tokens' log-probabilities
    logits: torch.Tensor | None = None
    streams: list[Stopper] = field(default_factory=list)
    stop_ids: set[int] = field(default_factory=set)  # of the stop strings that are special tokens

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        then: Sequence[int],
        copies: int,
        progress: Callable[[int], None] | None,
        on_compressed: Callable[[], None] | None,
    ) -> None:
        t0, session = time.perf_counter(), self.session
        if self.speculation:  # before anything is fed, because it may fail
            new = [*(prompts[0] if prompts else ()), *then]
            self.speculation.begin(session, new, self.limit, self.sampling, self.generator)
        if prompts:
            self.logits = session.start(prompts, copies, progress)
        if on_compressed:
            on_compressed()
        if then:
            session.reserve(len(then) + self.limit)
            rows = torch.tensor([list(then)], device=session.pos.device).expand(len(session.seen), -1)
            self.logits = session.feed_turn(rows)
        wait_for(session.pos.device)
        self.prefill_s = time.perf_counter() - t0
        self.lengths = [len(p) for p in prompts]
        self.prompt_tokens = sum(self.lengths) + len(then)
        n = len(session.seen) if self.beams == 1 else 1
        self.ids, self.texts, self.reasons = [[] for _ in range(n)], [""] * n, [None] * n
        before = [list(then)] * n if then else [list(p) for p in prompts for _ in range(n // len(prompts))]
        special = {s: self.tokenizer.hidden[s] for s in self.stop if s in self.tokenizer.hidden}
        self.stop_ids, text = set(special.values()), tuple(s for s in self.stop if s not in special)
        self.streams = [Stopper(Stream(self.tokenizer, ids), text) for ids in before]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        clock, column, runner = time.perf_counter(), None, self.session.models.runner
        before = compiled = runner.compile_s
        # where a pass gives several tokens, none may come without its time; the search is over before the first comes
        first_counted = 0 if self.beams > 1 else 1 if self.speculation else 2
        with closing(self._columns()) as columns:
            for i, column in enumerate(columns):
                tokens = column.tolist()
                if -1 in tokens:
                    raise ValueError(NOT_FINITE)
                if i >= first_counted and runner.compile_s == compiled:  # a step that compiled is not counted
                    self.decode_s += time.perf_counter() - clock
                    self.counted += self.reasons.count(None)
                self.unfed = None if self._ends(tokens[0]) else tokens[0]
                for row, token in enumerate(tokens):
                    yield from self._take(row, token, last=i + 1 == self.limit)
                if self.interrupted and self.beams == 1:
                    yield from self._interrupt()
                if all(self.reasons):
                    break
                compiled, clock = runner.compile_s, time.perf_counter()
        yield from self._interrupt()  # of a search that was interrupted all of the best text so far is the answer
        self.compile_s += runner.compile_s - before
        if self.session.undecided:  # a policy that waits has seen no token yet: give it the one it needs to decide
            self.session.feed(column[:, None])
            self.unfed = None

    def feed_rest(self) -> None:
        """Feed the answer's last token, so that the cache holds the whole answer."""
        if self.unfed is not None:
            self.session.feed(torch.tensor([[self.unfed]], device=self.session.pos.device))
            self.unfed = None

    def _columns(self) -> Generator[torch.Tensor]:
        if self.speculation:
            return self.speculation.generate(self.session, self.logits, self.limit)
        if self.beams > 1:
            return self._best_beam()
        return generate(self.session, self.logits, self.limit, self._sample)

    def _best_beam(self) -> Generator[torch.Tensor]:
        ends = self.stop_ids | (set() if self.ignore_eos else set(self.tokenizer.eos))
        self.session.is_searched = True
        found = search(self.session, self.logits, self.limit, ends, interrupted=lambda: self.interrupted)
        self.score, ids = found[0]
        for token in ids:
            yield torch.tensor([token])

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            tokens = sample(logits, self.sampling, self.generator)
            return tokens.masked_fill(~finite_rows(logits), -1)  # read with the tokens, so no step waits twice

    def _ends(self, token: int) -> bool:
        """Whether the token ends a text without being part of it."""
        return token in self.stop_ids or (token in self.tokenizer.eos and not self.ignore_eos)

    def _take(self, row: int, token: int, last: bool) -> Iterator[tuple[int, str]]:
        if self.reasons[row]:
            return  # a finished row goes on decoding into its own slots until all are finished
        if self._ends(token):
            self.reasons[row] = "stop" if token in self.stop_ids else "eos"
            yield from self._emit(row, self.streams[row].end())
            return
        self.ids[row].append(token)
        yield from self._emit(row, self.streams[row].push(token))
        if self.streams[row].stopped:
            self.reasons[row] = "stop"
        elif last:
            self.reasons[row] = "length"
            yield from self._emit(row, self.streams[row].end())

    def _interrupt(self) -> Iterator[tuple[int, str]]:
        for row, reason in enumerate(self.reasons):
            if reason is None:
                self.reasons[row] = "interrupted"
                yield from self._emit(row, self.streams[row].end())

    def _emit(self, row: int, piece: str) -> Iterator[tuple[int, str]]:
        if piece:
            self.texts[row] += piece
            yield row, piece
