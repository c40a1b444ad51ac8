"""The standard streams of a program, whatever their encoding, and whether or not they are open."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


def prepare() -> bool:
    """Make the standard streams fit for any text and any terminal. Returns whether standard output is open.

    Characters that a stream's encoding lacks are written as "?". What is said on stderr is lost without an error if
    nobody can read it. A closed stream is opened on the null device, so that no other file takes its number.
    """
    is_open = sys.stdout is not None
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            while (null := os.open(os.devnull, os.O_RDWR)) < number:
                pass  # a lower one is closed, too
            setattr(sys, name, open(null, mode, encoding="utf-8"))  # noqa: SIM115 it stays open
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if sys.stdin is sys.__stdin__ and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = Forgiving(sys.stderr.buffer, sys.stderr.encoding, "backslashreplace", line_buffering=True)
    return is_open


class Forgiving(io.TextIOWrapper):
    """A text stream that ignores that its other end is closed or full."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def forgive_output() -> None:
    """From now on, ignore that standard output cannot be written: what is printed also goes to a file."""
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = Forgiving(sys.stdout.buffer, sys.stdout.encoding, "replace")


def write_out(text: str = "") -> None:
    """Write a text to standard output, and what is buffered before it. OSError says in words that it cannot be written; a
    BrokenPipeError, that nobody reads it.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        drop_output()
        raise OSError(f"standard output cannot be written ({e.strerror}); send it elsewhere") from None


def drop_output() -> None:
    """Send standard output to the null device, with what is still buffered, so that nothing fails when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
