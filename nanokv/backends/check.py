"""Whether the Triton kernels compute the right numbers on a device that nobody has tried.

`kernels.selftest` runs each kernel once in a process of its own, because a kernel may crash or hang. Its verdicts are
kept in a file under the weights folder, so only the first run on a device waits for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nanokv.files import read_json, replacing

ROOT = Path(__file__).parent.parent.parent
# those that every plan needs; a store and a policy name the others
ALWAYS = ("add_rms_norm", "append", "compact", "decode", "linear", "rms_norm", "rotate", "swiglu", "take_slots")
LIMIT_S = 120.0  # the kernels are compiled for the first time
FILE = ".kernels-checked.json"


def verdicts(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    names: Sequence[str],
    folder: Path,
    limit_s: float = LIMIT_S,
    command: Sequence[str] = (sys.executable, "-m", "kernels.selftest"),
) -> dict[str, str]:
    """Kernel → why it cannot be used on this device, or nothing if it agreed with its twin.

    shape: G and D. Kernels without a verdict in the folder's file are run now. A kernel at which the process ended or
    did not end within limit_s is not usable; those behind it are tried next time.
    """
    file, key = folder / FILE, _key(device, dtype, shape)
    known = _read(file)
    found = {name: why for name, why in known.get(key, {}).items() if name in names}
    missing = [name for name in names if name not in found]
    if not missing:
        return found
    tried = _run(device, dtype, shape, missing, limit_s, command)
    _write(file, known | {key: known.get(key, {}) | tried})
    culprit = list(tried.items())[-1] if tried else ("", "")
    untried = f"was not tried, because {culprit[0]} {culprit[1]}"
    return found | {name: tried.get(name, untried) for name in missing}


def _key(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str:
    """What a verdict depends on: the device, the versions, the kernels' text, and the shape."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "no triton"
    text = hashlib.sha256()
    for file in sorted((ROOT / "kernels").glob("*.py")):
        text.update(file.read_bytes())
    return f"{name}, torch {torch.__version__}, triton {triton}, kernels {text.hexdigest()[:16]}, {dtype}, {shape}"


def _run(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    names: Sequence[str],
    limit_s: float,
    command: Sequence[str],
) -> dict[str, str]:
    """The verdicts of a process of its own. The last one is that of the kernel at which it ended, if not all are there."""
    line = [*command, str(device), str(dtype).removeprefix("torch."), *map(str, shape), *names]
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        out, fate = done.stdout, f"ended its process with status {done.returncode}"
    except subprocess.TimeoutExpired as e:
        out, fate = (e.stdout or b"").decode(), f"gave no answer within {limit_s:g} s"
    except OSError as e:
        out, fate = "", f"could not be run: {e.strerror}"
    found = {}
    for text in out.splitlines():
        try:
            entry = json.loads(text)
            found[entry["kernel"]] = str(entry["why"])
        except (ValueError, KeyError, TypeError):  # a compiler may print something of its own
            continue
    missing = [name for name in names if name not in found]
    return found | {missing[0]: fate} if missing else found


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    is_right = isinstance(found, dict) and all(
        isinstance(x, dict) and all(isinstance(why, str) for why in x.values()) for x in found.values()
    )
    return found if is_right else {}


def _write(file: Path, found: dict[str, dict[str, str]]) -> None:
    """Keep the verdicts; where nothing can be written, they are taken again next time."""
    if not os.access(file.parent, os.W_OK):
        return
    try:
        with replacing(file) as part:
            part.write_text(json.dumps(found, indent=1))
    except OSError:
        pass
