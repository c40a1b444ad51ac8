"""A conversation on one compressed cache: each turn feeds only what is new, and what a policy dropped stays dropped."""

from __future__ import annotations

from collections.abc import Callable

from nanokv.answer import Turn
from nanokv.cache.plan import Plan
from nanokv.llm import LLM

MARK = "\u241fthe answer stands here\u241f"


def cut(llm: LLM, messages: list[dict[str, str]], question: str) -> tuple[list[int], list[int]]:
    """The conversation rendered once with the question at the end of its last message, cut where the question begins."""
    *before, last = messages
    text = llm.tokenizer.chat([*before, {**last, "content": f"{last['content']}\n\n{MARK}{question}"}])
    prompt, mark, then = text.partition(MARK)
    if not mark:
        raise ValueError(
            "this model's chat template alters the message, so the question's place is lost; leave out --question"
        )
    return llm.tokenizer.encode(prompt, special=False), llm.tokenizer.encode_more(then)


class Conversation:
    """Messages so far and the session that holds them. `answer(session, prompts, then)` begins a turn with the caller's settings."""

    def __init__(self, llm: LLM, system: str | None, room: int, answer: Callable[..., Turn], chunk: int | None = None):
        self.llm, self.room, self.answer, self.chunk, self.plan = llm, room, answer, chunk, llm.plan
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        self.messages = self.asked = list(self.system)
        self.drop()

    def replan(self, plan: Plan) -> None:
        """Another policy from here on. What the old one dropped is read anew: the next turn prefills the whole conversation."""
        self.plan = plan
        self.drop()

    def drop(self) -> None:
        """Let the cache go, keep the messages: after an answer that was broken off, or for another policy."""
        self.session = self.turn = None

    def say(self, text: str) -> Turn:
        """Begin the answer to a user's message; `heard` ends it. Until then the conversation is as it was."""
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.session is None:
            session = self.llm.session(self.room, self.chunk, self.plan)
            self.turn = self.answer(session, [self._ids(self.llm.tokenizer.chat(messages))], [])
        else:
            session = self.session
            self.turn = self.answer(session, [], self._rest(text))
        self.session, self.asked = session, messages
        return self.turn

    def heard(self) -> None:
        """Note the question and the answer that was given."""
        self.messages = [*self.asked, {"role": "assistant", "content": self.turn.texts[0]}]

    def _rest(self, text: str) -> list[int]:
        """What the template puts between the last answer and the next one, after the token that was not fed yet."""
        marked = [*self.messages[:-1], {"role": "assistant", "content": MARK}, {"role": "user", "content": text}]
        _, _, rest = self.llm.tokenizer.chat(marked).partition(MARK)
        return [*([] if self.turn.unfed is None else [self.turn.unfed]), *self.llm.tokenizer.encode_more(rest)]

    def _ids(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text, special=False)
