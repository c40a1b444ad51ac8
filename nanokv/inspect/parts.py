"""The parts that a plan can have (--list-policies), told by their own docstrings.

The first sentence of a module says what its part does. A class docstring cites the paper and explains each option in a
line that begins with the option's name and two spaces; a test holds every part to that.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from dataclasses import fields
from typing import Any

from nanokv.cache.plan import AXES, AXIS_NAMES, nearest

WIDTH = 120


def list_parts() -> str:
    """A table of all parts by axis: name, paper, and what it does."""
    lines = []
    for axis, (sentence, parts) in zip(AXIS_NAMES, AXES.items(), strict=True):
        lines += ["", f"{axis}: parts that {sentence}"]
        lines += [f"  {n:12} {_paper(part):17} {_stands_for(n, part) or _summary(part)}" for n, part in parts.items()]
    return "\n".join([*lines[1:], "", "--list-policies NAME explains one of them with its options."])


def explain_part(name: str) -> str:
    """A part's docstring, and its options with defaults. ValueError if no part has this name."""
    if name == "auto":
        from nanokv import auto

        return f"auto (chooses a plan for one prompt under --kv-budget, nanokv/auto.py)\n\n{auto.__doc__.rstrip()}"
    axis = next((a for a, parts in zip(AXIS_NAMES, AXES.values(), strict=True) if name in parts), None)
    if axis is None:
        names = [n for parts in AXES.values() for n in parts]
        raise ValueError(f"unknown part {name!r}{nearest(name, names)}; --list-policies lists them all")
    part = next(parts[name] for parts in AXES.values() if name in parts)
    meanings = option_meanings(type(part))
    text = _without_options(inspect.getdoc(type(part)), meanings)
    file = sys.modules[type(part).__module__].__name__.replace(".", "/") + ".py"
    same_as = f", the same as {same}" if (same := _stands_for(name, part)) else ""
    lines = [f"{name} ({axis}, {file}{same_as})", "", text]
    if found := fields(part):
        given = {f.name: f"{f.name}={_shown(getattr(part, f.name))}" for f in found}
        width = max(map(len, given.values())) + 2
        lines += ["", f"options, with the defaults of {name}:"]
        for key, value in given.items():
            indent = " " * (width + 2)
            lines += textwrap.wrap(
                meanings.get(key, "(its class does not say)"),
                WIDTH,
                initial_indent="  " + value.ljust(width),
                subsequent_indent=indent,
            )
    return "\n".join(lines)


def option_meanings(kind: type) -> dict[str, str]:
    """Each option of a part → its meaning, from the docstrings of its class and of the classes that it extends."""
    names, found = {f.name for f in fields(kind)}, {}
    for cls in reversed(kind.__mro__):
        for key, text in _entries(inspect.cleandoc(cls.__doc__ or "")):
            if key in names:
                found[key] = text
    return found


def _entries(doc: str) -> list[tuple[str, str]]:
    """(name, text) of each entry `name  text`; its further lines are indented."""
    found = re.findall(r"^(\w+) {2,}(\S.*(?:\n +\S.*)*)", doc, re.MULTILINE)
    return [(name, " ".join(text.split())) for name, text in found]


def _without_options(doc: str, meanings: dict[str, str]) -> str:
    """The docstring without its entries for options."""
    return (
        re.sub(rf"^(?:{'|'.join(meanings)}) {{2,}}\S.*(?:\n +\S.*)*\n?", "", doc, flags=re.MULTILINE).rstrip()
        if meanings
        else doc
    )


def _paper(part: Any) -> str:
    """The arXiv id that the options of a short name cite, or else the first of the class docstring; – if there is none.
    In an option's text the paper of a value stands behind the value and a colon.
    """
    meanings, cited = option_meanings(type(part)), []
    for key in _changed(part):
        text = meanings.get(key, "")
        cited.append(text.partition(f"{_shown(getattr(part, key))}:")[2] or text)
    cited.append(type(part).__doc__)
    return next((found[0] for text in cited if (found := re.search(r"arXiv:\d{4}\.\d{5}", text))), "–")


def _changed(part: Any) -> list[str]:
    """The options in which a short name differs from its class."""
    default = type(part)()
    return [f.name for f in fields(part) if getattr(part, f.name) != getattr(default, f.name)]


def _stands_for(name: str, part: Any) -> str:
    """What a short name stands for, as in snapkv:layers=pyramid; empty for the first name of a class."""
    default = type(part)()
    original = next(n for parts in AXES.values() for n, p in parts.items() if p == default)
    options = ",".join(f"{key}={_shown(getattr(part, key))}" for key in _changed(part))
    return "" if name == original else f"{original}:{options}" if options else original


def _summary(part: Any) -> str:
    """The first sentence of the part's module."""
    doc = " ".join(sys.modules[type(part).__module__].__doc__.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", doc)[0]


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
