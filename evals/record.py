"""What a result needs beside its figures, and runs that can be broken off."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nanokv.llm import LLM


def facts(llm: LLM, packages: Sequence[str]) -> dict[str, Any]:
    """Commit, machine, versions, model: what somebody needs to do it again."""
    return {
        "commit": commit(),
        "machine": machine(llm.device),
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "model": llm.name,
        "dtype": llm.dtypes,
        "runner": llm.models.runner.name,
    }


def command(argv: Sequence[str]) -> str:
    """The command line, without the places where this machine keeps things."""
    return "python " + shlex.join(["bench.py", *(Path(a).name if Path(a).is_absolute() else a for a in argv)])


def commit() -> str | None:
    """The checkout's commit, with + if files differ from it."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--verify", "-q", "HEAD")
        return (head + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))) or None
    except OSError:
        return None


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    tiles = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{cpu}, {torch.get_num_threads()} threads{tiles}"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Journal:
    """Finished pieces of a long run, a JSON line each, so that the same command goes on where it stopped.

    The first line holds the settings: a file of other settings is refused, not overwritten. A line that a kill cut short is dropped.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.done = file, {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if lines and _read(lines[0]) != settings:
            raise ValueError(
                f"{file} holds a part of another run (other plans, code or machine); move it away, or go on with that one"
            )
        for line in lines[1:]:
            if (entry := _read(line)) is not None:
                self.done[entry["key"]] = entry["value"]
        whole = [{"key": k, "value": v} for k, v in self.done.items()]
        file.write_text("".join(json.dumps(x) + "\n" for x in [settings, *whole]), encoding="utf-8")

    def keep(self, key: str, value: Any) -> None:
        self.done[key] = value
        with self.file.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"key": key, "value": value}) + "\n")


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
