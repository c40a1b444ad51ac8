"""The process that runs chat templates: `template.py` starts it, writes one request per line and reads one answer per line.

It imports nothing of nanokv, which would import torch. A template is a program in jinja2 from the model's repository.
jinja2's sandbox keeps it from the machine. This process has limits of time and memory, and the system ends it when a
template exceeds them.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks what the assistant wrote. Only training needs the mark, so the block is
    rendered as if the tags were not there.
    """

    tags = {"generation"}  # noqa: RUF012 jinja2 reads it from the class

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    """The function of this name that chat templates call."""
    raise TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as chat templates expect it: without HTML escapes, and with these arguments in this order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(request: dict[str, Any]) -> str:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    env.filters["tojson"] = tojson
    return env.from_string(request["template"]).render(**request["values"])


def limit(memory: int) -> None:
    """Let this process grow by so many bytes at most, where the system can."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as f:
            size = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        pass


def set_alarm(seconds: float) -> None:
    """Let the system end this process after so many seconds of work, where it can; 0: never."""
    try:
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)
    except (ImportError, AttributeError):
        pass


def main(seconds: float, memory: int) -> None:
    limit(memory)
    for line in sys.stdin:
        request = json.loads(line)
        set_alarm(seconds)
        try:
            answer = {"text": render(request)}
            if len(answer["text"]) > request["longest"]:
                answer = {"error": f"it writes {len(answer['text'])} characters"}
        except MemoryError:
            answer = {"error": f"it takes more than {memory >> 20} MiB"}
        except Exception as e:  # a template can raise any exception
            answer = {"error": str(e)[:1000] or type(e).__name__}
        set_alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
