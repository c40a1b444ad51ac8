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
LASTING = "is off", "gives", "gave no answer"  # verdicts on the kernel itself begin so
PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from kernels import selftest; selftest.main(*sys.argv[2:6], sys.argv[6:])"


def verdicts(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    names: Sequence[str],
    folder: Path,
    limit_s: float = LIMIT_S,
    program: str = PROGRAM,
) -> dict[str, str]:
    """Kernel → why it cannot be used on this device, or nothing if it agreed with its twin.

    shape: G and D. Kernels without a verdict in the folder's file are run now. What may have had another cause than the
    kernel, such as too little memory, is not kept, so these kernels are tried again next time.
    """
    file, key = folder / FILE, _key(device, dtype, shape)
    known = _read(file)
    found = {name: why for name, why in known.get(key, {}).items() if name in names}
    missing = [name for name in names if name not in found]
    if not missing:
        return found
    tried, fate = _run(device, dtype, shape, missing, limit_s, program)
    if untried := [name for name in missing if name not in tried]:
        culprit = untried.pop(0)
        tried[culprit] = fate
        tried |= dict.fromkeys(untried, f"was not tried, because {culprit} {fate}")
    kept = {name: why for name, why in tried.items() if why.startswith(LASTING) or not why}
    _write(file, known | {key: known.get(key, {}) | kept})
    return found | tried


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
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], names: Sequence[str], limit_s: float, program: str
) -> tuple[dict[str, str], str]:
    """The verdicts of a process of its own, and how the process ended."""
    line = [sys.executable, "-c", program, str(ROOT), str(device), str(dtype).removeprefix("torch.")]
    try:
        done = subprocess.run([*line, *map(str, shape), *names], capture_output=True, text=True, timeout=limit_s)
        said = (done.stderr.strip().splitlines() or [""])[-1][:200]
        out, fate = done.stdout, f"ended its process with status {done.returncode}" + (f": {said}" if said else "")
    except subprocess.TimeoutExpired as e:
        out, fate = (e.stdout or b"").decode(), f"gave no answer within {limit_s:g} s"
    found = {}
    for text in out.splitlines():
        try:
            entry = json.loads(text)
            found[entry["kernel"]] = str(entry["why"])
        except (ValueError, KeyError, TypeError):  # a compiler may print something of its own
            continue
    return found, fate


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
