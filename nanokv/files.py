"""Write results whole or not at all, and check before the work that they can be written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

STREAMS = ("standard input", "standard output", "standard error")


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str | Path | None]) -> None:
    """flag → file, of what a run will write and of what it reads. ValueError if an output cannot be written, or would
    destroy another file of this run.
    """
    taken = {os.path.realpath(file): flag for flag, file in inputs.items() if file}
    for flag, file in outputs.items():
        if not file:
            continue
        if file == "-":
            raise ValueError(f"{flag} - is not possible, standard output carries the text; give a file")
        target = Path(os.path.realpath(file))  # of a symbolic link, what it points to
        try:
            there = target.exists()
        except OSError as e:
            raise ValueError(f"{flag} {file[:60]}… cannot be written ({e.strerror}); give a shorter name") from None
        if not target.parent.is_dir():
            raise ValueError(f"{flag} {file}: there is no directory {target.parent}; make it first")
        if target.is_dir() or not os.access(target if there else target.parent, os.W_OK):
            raise ValueError(f"{flag} {file} cannot be written; give a file in a directory of yours")
        if there and not target.is_file():
            continue  # a pipe or a device may be given twice
        if other := taken.get(str(target)) or (there and _stream_of(target)):
            raise ValueError(f"{flag} and {other} name the same file {file}; give two files")
        taken[str(target)] = flag


def _stream_of(target: Path) -> str:
    """Which standard stream this file is; empty if none."""
    for number, name in enumerate(STREAMS):
        with suppress(OSError):  # a closed stream
            if os.path.samestat(os.fstat(number), target.stat()):
                return name
    return ""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `file`, or of what that symbolic link points to. If the block
    raises, `file` is as before. ValueError if `file` is there and is no regular file.
    """
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        raise ValueError(f"{file} is no regular file, so it is not replaced; give another one")
    part = target.with_name(f".{target.name[-200:]}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_text(flag: str, file: str, text: str) -> None:
    """Write an output of a run. A pipe or a device is written to; a regular file is replaced."""
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ValueError(f"{flag} {file} cannot be written ({e.strerror}); give another file") from None
