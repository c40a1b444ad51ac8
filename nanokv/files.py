"""Read the files of a model, which anybody may have written. Write results whole or not at all, and check before the work
that they can be written.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_JSON = 16 << 20  # bytes; parsed JSON takes up to a dozen times as much memory
STREAMS = ("standard input", "standard output", "standard error")


def is_there(file: Path) -> bool:
    """Whether a model has this file. ValueError if something else stands in its place, which would block or vanish."""
    try:
        mode = file.stat().st_mode  # of what a symbolic link points to
    except FileNotFoundError:
        if not file.is_symlink():
            return False
        raise ValueError(f"{file} is a link to a file that is not there; fetch the model again") from None
    except OSError as e:  # such as a name that is too long, or links in a circle
        raise ValueError(f"{clipped(str(file))} cannot be read ({e.strerror}); fetch the model again") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} is no regular file; put one there, or remove it")
    return True


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. ValueError names the file if it is missing, damaged, too large or not an object."""
    if not is_there(file):
        raise ValueError(
            f"{file.parent} has no {file.name}; a model directory holds config.json, *.safetensors and a tokenizer"
        )
    try:
        if (size := file.stat().st_size) > MAX_JSON:
            raise ValueError(f"it has {size >> 20} MiB, and at most {MAX_JSON >> 20} are read")
        value = json.loads(file.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark first
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{file} cannot be read as JSON ({reason(e)}); fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}; an object is expected")
    return value


def reason(e: BaseException) -> str:
    """The first line of an exception's message, short enough for a sentence."""
    return clipped(next(iter(str(e).splitlines()), "") or type(e).__name__)


def clipped(text: str) -> str:
    """A text from a file, short and printable enough for a sentence."""
    text = "".join(c if c.isprintable() else "?" for c in text[:161])
    return text if len(text) <= 160 else f"{text[:160]}…"


def quoted(value: object) -> str:
    """A value from a file, in quotes if it is a text, short enough for a sentence."""
    try:
        text = repr(value[:200] if isinstance(value, str | list | tuple | bytes) else value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "a huge number"
    return text if len(text) <= 80 and text.isprintable() else f"{clipped(text)[:80]}…"


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
    folder = target.with_name(
        f".{target.name[-200:]}.part"
    )  # of its own: a library may put files beside the one it writes
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    folder.mkdir()
    try:
        yield folder / "part"
        (folder / "new").touch()
        shutil.copymode(target if target.exists() else folder / "new", folder / "part")  # safetensors makes it private
        os.replace(folder / "part", target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
