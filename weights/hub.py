"""Download a model, or one file of it, from the Hugging Face hub.

huggingface_hub finds the repository and logs in. `_download_file` downloads the files, because the library's own
download (checked in 1.31 and 1.33) deletes the partial file when it is interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

TEXT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # a model needs one of these
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def model_from_hub(repo: str, target: Path, bar: bool) -> Path:
    """Return a hub model from the library's cache, or download it. ValueError says why it cannot be downloaded."""
    cached = _cached_snapshot(repo)
    if cached is not None:
        return cached
    with _reachable(repo, bar), only_one(target):
        return target if (target / "config.json").is_file() else _download_repo(repo, target)


def file_from_hub(repo: str, name: str, partial: Path, bar: bool) -> Path:
    """Download one file of a repository into `partial`, where an interrupted download is resumed."""
    with _reachable(repo, bar):
        from huggingface_hub import HfApi, constants

        info = HfApi().model_info(repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        found = next((s for s in info.siblings or [] if s.rfilename == name), None)
        if found is None:
            raise ValueError(f"{repo} has no file {name} any more")
        return _download_file(repo, info.sha, found, partial)


@contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Only one process at a time downloads a model; others wait, and should then look whether it is there."""
    from huggingface_hub.utils import WeakFileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.parent / f".lock-{target.name}"):
        yield


@contextmanager
def _reachable(repo: str, bar: bool) -> Iterator[None]:
    """Raise whatever keeps the hub from giving a repository as a ValueError that says so."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo} is not on this machine and HF_HUB_OFFLINE is set; unset it to fetch the model")
    (enable_progress_bars if bar else disable_progress_bars)()
    logging.set_verbosity_error()  # hide its warning about each retry: the user gets one line
    try:
        yield
    except hub.GatedRepoError:
        raise ValueError(
            f"{repo} is gated: accept its licence on its hub page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except hub.RepositoryNotFoundError:
        raise ValueError(f"the hub has no model {repo}, or it is private: check the name, or `hf auth login`") from None
    except hub.HfHubHTTPError as e:
        answer = " ".join(str(e).split())
        raise ValueError(
            f"{repo} could not be fetched, the hub says: {answer}; what has arrived is kept, run again to go on"
        ) from None
    except json.JSONDecodeError:
        raise ValueError(
            f"{repo} could not be fetched: {constants.ENDPOINT} does not answer like a hub; check HF_ENDPOINT and the network"
        ) from None
    except ValueError:
        raise
    except Exception as e:  # the HTTP library underneath differs between versions of huggingface_hub
        if getattr(e, "errno", None):
            raise  # a disk error; `locate` reports it
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"{repo} could not be fetched: no network, or {constants.ENDPOINT} does not answer ({reason}); "
            "what has arrived is kept, run again to go on"
        ) from None


def _download_repo(repo: str, target: Path) -> Path:
    """Download the files that a model needs, check them, and move them to `target`."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = {s.rfilename: s for s in info.siblings or [] if "/" not in s.rfilename}
    texts, shards = _needed_files(repo, list(files))
    partial = target.parent / f".partial-{target.name}"  # kept after an interruption, so that the next run resumes
    partial.mkdir(exist_ok=True)
    done = {f: _download_file(repo, info.sha, files[f], partial) for f in texts}
    if INDEX in done:
        shards = _indexed_shards(repo, done[INDEX], files)
    done |= {f: _download_file(repo, info.sha, files[f], partial) for f in shards}
    from nanokv.model.loader import find_shards  # imported here because it imports torch

    with staging(target) as tmp:
        folder = tmp / "model"
        folder.mkdir()
        for name, file in done.items():
            os.replace(file, folder / name)
        try:
            find_shards(folder)
        except ValueError as e:
            raise ValueError(f"{repo}: {str(e).replace(f'{folder}{os.sep}', '')}") from None
        publish(folder, target)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def _download_file(repo: str, revision: str, file, partial: Path) -> Path:
    """Download one file, check its size and hash, and return its path. Resumes a partial file of the same version."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = partial / f"{file.rfilename}.{file.blob_id or revision}"
    size = part.stat().st_size if part.is_file() else 0
    if file.size is None or size > file.size:
        part.unlink(missing_ok=True)
        size = 0
    if size == 0 or size != file.size:
        url = hf_hub_url(repo, file.rfilename, revision=revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # a compressed transfer cannot be resumed
        with part.open("ab") as f:
            http_get(url, f, resume_size=size, headers=headers, displayed_filename=file.rfilename)
    size = part.stat().st_size
    fault = f"{size} bytes, expected {file.size}" if file.size not in (None, size) else ""
    if not fault and file.lfs is not None and sha256(part) != file.lfs.sha256:
        fault = f"a sha256 other than the hub's {file.lfs.sha256[:16]}…"
    if fault:
        part.unlink()
        raise ValueError(f"{repo}: {file.rfilename} arrived with {fault}; refused, run again to download it again")
    return part


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _needed_files(repo: str, files: list[str]) -> tuple[list[str], list[str]]:
    """Choose the files to download. Returns (text files, safetensors shards); an index later replaces the shards."""
    shards = [f for f in files if f.endswith(".safetensors")]
    # some repositories have a second copy of the weights, consolidated.safetensors
    standard = [f for f in shards if f.startswith("model")]
    if not shards:
        pickled = [f for f in files if f.endswith(PICKLE_SUFFIXES)]
        reason = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no safetensors"
        raise ValueError(f"{repo} has {reason}; choose a repository with safetensors")
    if "config.json" not in files:
        raise ValueError(f"{repo} has no config.json; it is not a model that can be loaded")
    if not any(t in files for t in TOKENIZER_FILES):
        raise ValueError(f"{repo} has neither {' nor '.join(TOKENIZER_FILES)}; choose a repository with a tokenizer")
    return [f for f in (*TEXT_FILES, INDEX) if f in files], standard or shards


def _indexed_shards(repo: str, index: Path, files: Container[str]) -> list[str]:
    """Return the shards that the index names. ValueError if the repository lacks one of them."""
    try:
        shards = sorted({str(f) for f in json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()})
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


def _cached_snapshot(repo: str) -> Path | None:
    """Return a complete snapshot from the hub library's own cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return None
    from nanokv.model.loader import find_shards

    path = Path(config).parent
    try:
        shards = find_shards(path)
    except (ValueError, OSError):  # incomplete, so the model is downloaded
        return None
    sharded = any("-of-" in f.name for f in shards)
    complete = any((path / t).is_file() for t in TOKENIZER_FILES) and (not sharded or (path / INDEX).is_file())
    return path if complete else None


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder beside `target` to make a model in. What a killed process left of one is removed; call under `only_one`."""
    prefix = f".fetch-{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as tmp:
        yield Path(tmp)


def publish(folder: Path, target: Path) -> Path:
    """Rename a finished directory to its final name. If another process was faster, keep its directory."""
    try:
        os.replace(folder, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    return target
