"""Render a model's chat template: a program in jinja2 from the model's repository, so jinja2's sandbox runs it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any


def render(
    template: str, messages: Sequence[Mapping[str, str]], specials: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The text of a conversation. `specials` are the special tokens by their names in a template, such as bos_token."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation()])
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    env.filters["tojson"] = _tojson
    try:
        return env.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **specials
        )
    except Exception as e:  # a template can raise any exception
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise ValueError(f"the model's chat template refuses this conversation: {reason}") from None


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
