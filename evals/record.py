"""Facts that make a result reproducible, and a journal from which an interrupted run resumes."""

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
    """Return commit, machine, versions and model, so that others can repeat a run."""
    return {
        "commit": commit(),
        "machine": machine(llm.device),
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "model": llm.name,
        "dtype": llm.dtypes,
        "cache_dtype": llm.cache_dtype,
        "runner": llm.models.runner.name,
    }


def command(argv: Sequence[str]) -> str:
    """Return the command line. Absolute paths are shortened to their last part."""
    return "python " + shlex.join(["bench.py", *(Path(a).name if Path(a).is_absolute() else a for a in argv)])


def commit() -> str | None:
    """Return the checkout's commit, with + if files differ from it, or None outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--verify", "-q", "HEAD")
        return (head + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))) or None
    except OSError:
        return None


def machine(device: torch.device) -> str:
    """Name the GPU, or the CPU with its number of threads."""
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
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Journal:
    """The finished parts of a long run, one JSON line each. The same command resumes from them.

    The first line holds the settings. ValueError if a file has other settings: it is not overwritten. A line that is
    incomplete, or no finished part, is dropped.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.done = file, {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if lines and _read(lines[0]) != settings:
            raise ValueError(
                f"{file} is from another run (other plans, code or machine); move it away, or resume that run"
            )
        for line in lines[1:]:
            entry = _read(line)
            if isinstance(entry, dict) and isinstance(entry.get("key"), str) and "value" in entry:
                self.done[entry["key"]] = entry["value"]
        entries = [{"key": k, "value": v} for k, v in self.done.items()]
        file.write_text("".join(json.dumps(x) + "\n" for x in [settings, *entries]), encoding="utf-8")

    def keep(self, key: str, value: Any) -> None:
        """Store the result of a finished part."""
        self.done[key] = value
        with self.file.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"key": key, "value": value}) + "\n")


def _read(line: str) -> Any:
    """Parse a line, or return None if it is incomplete."""
    try:
        return json.loads(line)
    except ValueError:
        return None
