"""Render a model's chat template: a program in jinja2 from the model's repository. jinja2's sandbox keeps it from the
machine; here it is also kept to a bounded time and memory.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from nanokv.files import reason

MAX_LENGTH = 256 << 10  # characters of a template; the longest known ones have 30,000
MAX_S = 2.0  # seconds
MAX_MEMORY = 128 << 20  # bytes beyond what the process has
MAX_BITS = 10_000  # of a whole number
SLOW_FILTERS = (
    "pprint",
    "round",
    "striptags",
    "urlize",
    "wordwrap",
)  # one call may take minutes, and no chat needs them


def render(
    template: str, messages: Sequence[Mapping[str, str]], specials: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The text of a conversation. `specials` are the special tokens by their names in a template, such as bos_token.

    ValueError if the template refuses the conversation, is wrong, or takes too much time or memory.
    """
    if len(template) > MAX_LENGTH:
        raise ValueError(f"the model's chat template has {len(template)} characters; at most {MAX_LENGTH} are read")
    env = _environment(time.monotonic() + MAX_S)
    try:
        with _bounded_memory():
            return env.from_string(template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **specials
            )
    except MemoryError:
        raise ValueError(f"the model's chat template takes more than {MAX_MEMORY >> 20} MiB; refused") from None
    except Exception as e:  # a template can raise any exception
        raise ValueError(f"the model's chat template refuses this conversation: {reason(e)}") from None


def _environment(deadline: float) -> Any:
    """A sandbox in which every pass of a loop, every call and every filter looks at the clock."""
    from jinja2 import nodes
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def look_at_the_clock(self) -> str:
            if time.monotonic() > deadline:
                raise TimeoutError(f"it takes more than {MAX_S:.0f} seconds")
            return ""

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*" and sum(x.bit_length() for x in (left, right) if isinstance(x, int)) > MAX_BITS:
                raise OverflowError("a number is too large")
            if operator == "**" and not all(isinstance(x, int | float) and abs(x) < 1000 for x in (left, right)):
                raise OverflowError("** takes numbers below 1000")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, called: Any, *args: Any, **named: Any) -> Any:
            self.look_at_the_clock()
            return super().call(context, called, *args, **named)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = super()._parse(source, name, filename)
            look = nodes.Call(nodes.EnvironmentAttribute("look_at_the_clock"), [], [], None, None)
            for block in tree.find_all((nodes.For, nodes.Macro)):
                block.body.insert(0, nodes.ExprStmt(look))
            return tree

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # it carries over jinja2's marks, such as that a filter wants the environment
        def run(*args: Any, **named: Any) -> Any:
            env.look_at_the_clock()
            return function(*args, **named)

        return run

    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation()])
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    env.filters["tojson"] = _tojson
    env.filters = {name: watched(function) for name, function in env.filters.items() if name not in SLOW_FILTERS}
    del env.globals["lipsum"]
    return env


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process grow by MAX_MEMORY at most, where the system can. The limit would also hold for other threads, so in
    a program with several there is none.
    """
    others = [t for t in threading.enumerate() if not t.daemon and t is not threading.current_thread()]
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as f:
            size = int(f.read().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):
        before = None
    if before is None or others:
        yield
        return
    allowed = [size + MAX_MEMORY, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _generation() -> type:
    """The extension for {% generation %} … {% endgeneration %}, which marks what the assistant wrote. Only training
    needs the mark, so the block is rendered as if the tags were not there.
    """
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 jinja2 reads it from the class

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _raise_exception(message: str) -> None:
    """The function of this name that chat templates call."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as chat templates expect it: without HTML escapes, and with these arguments in this order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
