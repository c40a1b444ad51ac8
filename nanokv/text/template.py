"""Render a model's chat template, in a process of its own (see `template_worker.py`)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanokv.files import clipped

MAX_LENGTH = 256 << 10  # characters of a template; the longest known ones have 30,000
MAX_S = 2.0  # seconds of work
MAX_WAIT_S = 4.5  # seconds of the clock, should the machine be busy
MAX_MEMORY = 128 << 20  # bytes
MAX_TEXT = 1 << 20  # characters, beside ten times those of the conversation
WORKER = Path(__file__).with_name("template_worker.py")


class Renderer:
    """Renders templates in one process, which starts with the first one, or earlier by `start`, and ends with this object.
    After a fork the child has a process of its own.
    """

    def __init__(self, seconds: float = MAX_S):
        """seconds: how long one conversation may be worked on."""
        self.seconds, self.lock, self.process, self.owner = seconds, threading.Lock(), None, 0

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, str]],
        specials: Mapping[str, str],
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation. `specials` are the special tokens by their names in a template, such as bos_token.

        ValueError if the template refuses the conversation, is wrong, or takes too much time or memory.
        """
        if len(template) > MAX_LENGTH:
            raise ValueError(f"the model's chat template has {len(template)} characters; at most {MAX_LENGTH} are read")
        values = dict(specials) | {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        longest = MAX_TEXT + 10 * sum(len(str(text)) for message in messages for text in message.values())
        request = {"template": template, "values": values | {"tools": None, "documents": None}, "longest": longest}
        with self.lock:
            answer = self._ask(request)
        if "text" in answer:
            return answer["text"]
        why = answer.get("error", f"it takes more than {self.seconds:g} seconds or {MAX_MEMORY >> 20} MiB")
        raise ValueError(f"the model's chat template refuses this conversation: {clipped(why.splitlines()[0])}")

    def start(self) -> None:
        """Start the process now, so that the first template need not wait for it."""
        with self.lock:
            self._run()

    def _run(self) -> None:
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            command = [sys.executable, str(WORKER), str(self.seconds), str(MAX_MEMORY)]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            self.owner = os.getpid()
            weakref.finalize(self, _end, self.process, self.owner)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """The answer, or {} if the process did not live to give one."""
        self._run()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self._read_line())
        except (OSError, ValueError):
            _end(self.process, self.owner)
            self.process = None
            return {}

    def _read_line(self) -> bytes:
        line, fd, deadline = bytearray(), self.process.stdout.fileno(), time.monotonic() + MAX_WAIT_S
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
            part = os.read(fd, 1 << 20) if ready else b""
            if not part:
                raise OSError("no answer")
            line += part
        return bytes(line)


def _end(process: subprocess.Popen, owner: int) -> None:
    """End a process that this one started."""
    if owner == os.getpid() and process.poll() is None:
        process.kill()
        process.wait()
