"""A process that is killed at any moment loses nothing, and the next one leaves nothing of it behind."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz.gguf_parts import write_gguf
from helpers import ROOT
from test_hub import REPO, checkpoint, locate, serving, tensors  # noqa: F401 two of them are fixtures

from nanokv import load, parse
from nanokv.model.loader import find_shards
from nanokv.save import restore
from nanokv.sharing.search import read_map

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
KILLS = 20


def killed(script: str, env: dict | None, after: float, *args: str) -> None:
    """Start Python on this script and kill it so many seconds after it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *args], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(after)
    process.kill()
    process.wait()
    process.stdout.close()


def left(folder: Path) -> list[str]:
    """What lies in a folder, but for the empty files of locks."""
    return sorted(x.name for x in folder.iterdir() if not (x.name.startswith(".lock-") and x.stat().st_size == 0))


@pytest.mark.parametrize("n", range(KILLS))
def test_fetching(n, checkpoint, tmp_path):  # noqa: F811
    script = f"""
import huggingface_hub.file_download, time, weights.fetch, weights.hub
slow = weights.hub.sha256
weights.hub.sha256 = lambda file: (time.sleep(0.2), slow(file))[1]
print("ready", flush=True)
weights.fetch.locate("{REPO}")
"""
    with serving(checkpoint, tmp_path) as hub:
        killed(script, hub.env, random.Random(n).uniform(0, 1.5))
        assert locate(hub) == hub.target
        assert left(hub.weights) == [hub.target.name]
        assert find_shards(hub.target)


CONVERT = """
import sys, shutil, time
from pathlib import Path
from weights import fetch, from_gguf
from weights.registry import Gguf
file, target, digest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def here(name, source, partial, bar):
    shutil.copy(file, partial / "m.gguf")
    return partial / "m.gguf", "here"

fetch._fetch_gguf = here
unpermute = from_gguf.unpermute
from_gguf.unpermute = lambda x, heads: (time.sleep(float(sys.argv[4])), unpermute(x, heads))[1]
source = Gguf("m.gguf", 1, digest, (), "1", "*")
print("ready", flush=True)
fetch._from_gguf("m", source, target, False, lambda line: None)
print("done", flush=True)
"""


@pytest.mark.parametrize("n", range(KILLS))
def test_converting(n, tmp_path):
    file, target = tmp_path / "m.gguf", tmp_path / "weights" / "m"
    write_gguf(file, "{{ messages }}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    killed(CONVERT, None, random.Random(n).uniform(0, 1.2), str(file), str(target), digest, "0.05")
    again = subprocess.run(
        [sys.executable, "-c", CONVERT, str(file), str(target), digest, "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert left(tmp_path / "weights") == ["m"]
    load(str(target), dtype="float32")


SAVE = """
import sys
from pathlib import Path
from nanokv import load, parse
from nanokv.save import save
llm = load(sys.argv[1], dtype="float32")
sessions = []
for n in (300, 500):
    session = llm.session(4, None, parse("full+int4"))
    session.start([list(range(5, 95)) * 5 + list(range(5, 5 + n % 90))])
    sessions.append(session)
save(llm, sessions[0], Path(sys.argv[2]))
print("ready", flush=True)
while True:
    for session in sessions:
        save(llm, session, Path(sys.argv[2]))
"""


def test_saving(tiny, tmp_path):
    path, _ = tiny("g3")
    llm = load(str(path), dtype="float32")
    for n in range(KILLS):
        killed(SAVE, None, random.Random(n).uniform(0, 0.1), str(path), str(tmp_path / "c"))
        session = restore(llm, tmp_path / "c", 4)
        assert session.seen[0] in (450 + 300 % 90, 450 + 500 % 90)
    from nanokv.save import save

    session = llm.session(4, None, parse("full"))
    session.start([[1, 2, 3]])
    save(llm, session, tmp_path / "c")
    assert left(tmp_path) == ["c"]


SEARCH = """
import sys
from pathlib import Path
from nanokv import load
from nanokv.sharing.kvsharer import KVSharer
from nanokv.sharing.search import write_map
llm = load(sys.argv[1], dtype="float32")
write = lambda share: write_map(Path(sys.argv[2]), "deep", llm.fingerprint(), KVSharer(layers=1), share, [])
write({3: 1})
print("ready", flush=True)
while True:
    write({3: 1})
    write({5: 2, 3: 1})
"""


def test_searching(tiny, tmp_path):
    path, _ = tiny("deep")
    llm, file = load(str(path), dtype="float32"), tmp_path / "maps" / "m.json"
    for n in range(KILLS):
        killed(SEARCH, None, random.Random(n).uniform(0, 0.1), str(path), str(file))
        assert read_map(file, llm.fingerprint(), llm.config) in ({3: 1}, {5: 2, 3: 1})
    from nanokv.sharing.kvsharer import KVSharer
    from nanokv.sharing.search import write_map

    write_map(file, "deep", llm.fingerprint(), KVSharer(layers=1), {3: 1}, [])
    assert left(file.parent) == ["m.json"]
