"""A conversation on one compressed cache. Each turn feeds only the new tokens; what a policy evicted stays evicted.

It knows messages, the chat template and sessions. Plans come from the caller's parser and lines from the caller's
keyboard.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nanokv.answer import Answer
from nanokv.cache.plan import Plan
from nanokv.cli import print_answer
from nanokv.engine import Session
from nanokv.llm import LLM

MARK = "\u241fthe answer stands here\u241f"  # no real message contains this


def encode_prompt(
    llm: LLM, text: str, question: str | None = None, chat: bool = False, system: str | None = None
) -> tuple[list[int], list[int]]:
    """The token ids of the prompt and of the question after it. `chat` or a system message: in the model's chat
    template.
    """
    if not chat and system is None:
        return llm.tokenizer.encode(text), [] if question is None else llm.tokenizer.encode_more(question)
    messages = [*_system(system), {"role": "user", "content": text}]
    if question is None:
        return llm.tokenizer.encode(llm.tokenizer.chat(messages), special=False), []
    return split_at_question(llm, messages, question)


def encode_later(llm: LLM, text: str, place: str | None) -> list[int]:
    """The token ids of a text that follows a saved prompt. place: where that ends in the chat template, `question` (in the
    user's message) or `answer`; None: it is plain text.
    """
    if place is None:
        return llm.tokenizer.encode_more(text)
    if place == "question":
        messages = [{"role": "user", "content": MARK + text}]
    else:
        answered = [{"role": "user", "content": "…"}, {"role": "assistant", "content": MARK}]
        messages = [*answered, {"role": "user", "content": text}]
    return behind_mark(llm, messages)


def behind_mark(llm: LLM, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of what the chat template puts behind MARK, which stands in one of the messages."""
    _, mark, then = llm.tokenizer.chat(messages).partition(MARK)
    if not mark:
        raise ValueError("this model's chat template alters messages, so the place where the text goes on is lost")
    return llm.tokenizer.encode_more(then)


def stops(llm: LLM, given: Sequence[str]) -> list[str]:
    """The stop texts of a chat: `given`, and the token that ends a turn in the chat template, if the model's files do not
    name it as an end of text. A line of `llm.notes` says so.
    """
    end = llm.tokenizer.turn_end()
    if not end or llm.tokenizer.hidden[end] in llm.tokenizer.eos:
        return list(given)
    llm.notes.append(
        f"the chat template ends a turn with {end}, which the model's files do not name as an end of text; it ends an answer"
    )
    return [*given, end]


def split_at_question(llm: LLM, messages: list[dict[str, str]], question: str) -> tuple[list[int], list[int]]:
    """Render the conversation once, with the question at the end of its last message. Cut it where the question
    begins.
    """
    *before, last = messages
    text = llm.tokenizer.chat([*before, {**last, "content": f"{last['content']}\n\n{MARK}{question}"}])
    prompt, mark, then = text.partition(MARK)
    if not mark:
        raise ValueError(
            "this model's chat template alters the message, so the question's place is lost; leave out --question"
        )
    return llm.tokenizer.encode(prompt, special=False), llm.tokenizer.encode_more(then)


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


class Conversation:
    """The messages so far and the session that caches them.

    `options` are keyword arguments of LLM.answer, the same for every answer; they name the `limit` of new tokens.
    """

    def __init__(self, llm: LLM, system: str | None, options: Mapping[str, Any], chunk: int | None = None):
        self.llm, self.options, self.chunk, self.plan = llm, options, chunk, llm.plan
        self.system = _system(system)
        llm.tokenizer.chat([{"role": "user", "content": "hello"}])  # refuses a model without a chat template at once
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages = self.pending = list(self.system)
        self.drop_cache()

    def set_plan(self, plan: Plan) -> None:
        """Use another plan from now on. The next turn prefills the whole conversation under it."""
        self.plan = plan
        self.drop_cache()

    def drop_cache(self) -> None:
        """Free the cache and keep the messages."""
        self.session = self.latest = None

    def ask(self, text: str) -> Answer:
        """Start the answer to a user's message. The message becomes part of the conversation in finish()."""
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.session is None:
            session = self.llm.session(self.options["limit"], self.chunk, self.plan)
            prompt = self.llm.tokenizer.encode(self.llm.tokenizer.chat(messages), special=False)
            self.latest = self.llm.answer(session, [prompt], **self.options)
        else:
            session = self.session
            self.latest = self.llm.answer(session, [], then=self._new_tokens(text), **self.options)
        self.session, self.pending = session, messages
        return self.latest

    def finish(self) -> None:
        """Add the question and its answer to the conversation."""
        self.messages = [*self.pending, {"role": "assistant", "content": self.latest.texts[0]}]

    def command(self, name: str, argument: str, parse_plan: Callable[[str], Plan]) -> str:
        """Run /reset, /stats or /policy. Return the line to show."""
        if name == "/reset":
            self.reset()
            return "the conversation is forgotten"
        if name == "/stats":
            return "nothing is cached yet" if self.session is None else str(self.session.report())
        if name == "/policy":
            if argument:
                self.set_plan(parse_plan(argument))
            return str(self.plan)
        return f"unknown command {name}; commands are /reset /stats /policy PLAN /exit"

    def _new_tokens(self, text: str) -> list[int]:
        """The tokens that are not cached yet: the last token of the answer, if it was never fed, and then what the
        template puts between that answer and the next one."""
        marked = [*self.messages[:-1], {"role": "assistant", "content": MARK}, {"role": "user", "content": text}]
        unfed = [] if self.latest.unfed is None else [self.latest.unfed]
        return [*unfed, *behind_mark(self.llm, marked)]


def repl(
    chat: Conversation,
    lines: Iterable[str],
    parse_plan: Callable[[str], Plan],
    report: Callable[[Session], None],
    fail: Callable[[str], object],
) -> None:
    """Answer every line and run every command until /exit or the last line. report(session) is called after each
    answer.

    A message that fails leaves the conversation unchanged: fail(message) is called, and the next line is read.
    """
    for line in lines:
        name, _, argument = line.strip().partition(" ")
        if name == "/exit":
            return
        try:
            if name.startswith("/"):
                print(chat.command(name, argument, parse_plan), file=sys.stderr)
            elif name:
                print_answer(chat.ask(line))
                chat.finish()
                report(chat.session)
        except ValueError as e:
            fail(str(e))
        except KeyboardInterrupt:
            print("interrupted; the next turn prefills the conversation again", file=sys.stderr)
        if chat.session is not None and not chat.session.intact:
            chat.drop_cache()
