"""Token ids to text as they come: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from nanokv.text import tokenizer
from nanokv.text.tokenizer import INCOMPLETE, Tokenizer


class Stream:
    """Turn tokens into text one by one. Text is returned as soon as later tokens cannot change it.

    `before` holds the ids of the text that the stream continues.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]):
        self.tokenizer = tokenizer
        self.pending: list[int] = []
        ids = list(before[-256:])
        while tokenizer.decode(ids).startswith(INCOMPLETE):
            ids = ids[1:]  # start with the token after the incomplete character
        self._set_shown(ids)

    def push(self, token: int) -> str:
        """Add a token and return the text that is now final. "" if there is none."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.shown + self.pending)
        if text.endswith(INCOMPLETE) and len(self.pending) < 64:  # 64 tokens are not one character
            return ""
        piece = text[self.length :]
        if piece:
            self._set_shown(self.pending)
            self.pending = []
        return piece

    def end(self) -> str:
        """Return the text that was not final yet."""
        return self.tokenizer.decode(self.shown + self.pending)[self.length :]

    def _set_shown(self, ids: list[int]) -> None:
        """Store the last ids whose text was returned: they decide whether the next text starts with a space."""
        self.shown, self.length = ids, len(self.tokenizer.decode(ids))


class Stopper:
    """A text stream that ends before the first stop string. It holds back text that could be the beginning of one."""

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
