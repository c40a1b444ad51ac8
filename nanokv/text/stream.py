"""Token ids to text as they come: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from nanokv.text import tokenizer
from nanokv.text.tokenizer import CUT, Tokenizer


class Stream:
    """Token by token to text: gives out what is final, holds back what the next token may still change."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]):
        self.tokenizer = tokenizer
        self.held: list[int] = []
        ids = list(before[-256:])
        while tokenizer.decode(ids).startswith(CUT):  # the first character is not whole: begin with the next
            ids = ids[1:]
        self._shown(ids)

    def push(self, token: int) -> str:
        self.held.append(token)
        text = self.tokenizer.decode(self.given + self.held)
        if text.endswith(CUT) and len(self.held) < 64:  # more than that is no character any more
            return ""
        piece = text[self.length :]
        if piece:
            self._shown(self.held)
            self.held = []
        return piece

    def end(self) -> str:
        """What was held back."""
        return self.tokenizer.decode(self.given + self.held)[self.length :]

    def _shown(self, ids: list[int]) -> None:
        """Ids whose text is out: they end with a whole character, and decide whether the next one is preceded by a space."""
        self.given, self.length = ids, len(self.tokenizer.decode(ids))


class Stopper:
    """A text stream that ends before the first stop string, and holds back what could be the beginning of one."""

    def __init__(self, stream: tokenizer.Stream, stop: tuple[str, ...]):
        self.stream, self.stop, self.held, self.stopped = stream, stop, "", False

    def push(self, token: int) -> str:
        return self._pass(self.stream.push(token), final=False)

    def end(self) -> str:
        return "" if self.stopped else self._pass(self.stream.end(), final=True)

    def _pass(self, piece: str, final: bool) -> str:
        text = self.held + piece
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
