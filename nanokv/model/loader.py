"""Safetensors → model, strict: every weight present once, of the right shape, and nothing else. Reads
from the memory-mapped shards straight into place, dtype and device, two tensors at a time: the peak is the model and those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from nanokv.backends.base import Ops
from nanokv.model.config import ModelConfig, read_json
from nanokv.model.llama import Llama, RMSNorm
from nanokv.model.rope import inverse_frequencies

Named = tuple[str, tuple[int, ...], Callable[[], Any]]  # checkpoint name, shape, how to read it
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def empty(config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> Llama:
    """A model whose weights are allocated and not yet written."""
    with torch.device("meta"):
        model = Llama(config, ops).to(dtype)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.float()  # norms work on the fp32 residual stream
    model.to_empty(device=device)
    if config.tie_word_embeddings:  # to_empty gives each use of a shared parameter memory of its own
        model.lm_head.weight = model.embed_tokens.weight
    model.inv_freq = inverse_frequencies(config).to(device)
    return model.eval().requires_grad_(False)


def load(
    path: Path, config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype, bar: bool = False
) -> Llama:
    """The checkpoint in `path` as a model. ValueError names the file or tensor that is wrong."""
    model = empty(config, ops, device, dtype)
    fill(model, read(find_shards(path)), str(path), bar)
    return model


def fill(model: Llama, tensors: Iterable[Named], where: str, bar: bool = False) -> None:
    """Write every tensor into its place; strict. Two at a time: one thread copies while the other waits for the disk."""
    missing, jobs = targets(model), []
    for name, shape, read in tensors:
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue  # old checkpoints carry the table; a tied head repeats the embedding
        if name not in missing:
            raise ValueError(
                f"{where} holds {name[:80]!r}, which this model has no place for (or twice); is config.json of another model?"
            )
        target = missing.pop(name)
        if shape != tuple(target.shape):
            raise ValueError(f"{where}: {name} has shape {shape}, config.json asks for {tuple(target.shape)}")
        jobs.append((target, read))
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} tensors, the first is {min(missing)}; fetch the model again")
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda job: job[0].copy_(torch.as_tensor(job[1]())), jobs)
        list(tqdm(done, total=len(jobs), desc="load", unit="tensor", leave=False, disable=not bar))


def read(files: dict[Path, list[str]]) -> Iterator[Named]:
    """Names and shapes of all tensors, from the headers; the values when asked."""
    for file, names in files.items():
        with _open(file) as f:
            for name in names:
                piece = f.get_slice(name)
                if piece.get_dtype() not in FLOATS:
                    raise ValueError(
                        f"{file.name}: {name[:80]!r} is {piece.get_dtype()}; weights are one of {', '.join(FLOATS)}"
                    )
                yield name, tuple(piece.get_shape()), partial(_tensor, file, name)


def _tensor(file: Path, name: str) -> Tensor:
    """Opened anew for each tensor: a mapping that stays open keeps every page it has read resident."""
    with _open(file) as f:
        return f.get_tensor(name)


def copy(model: Llama, ops: Ops, dtype: torch.dtype) -> Llama:
    """The same weights in another dtype."""
    twin = empty(model.config, ops, model.embed_tokens.weight.device, dtype)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        ours.copy_(theirs)
    return twin


def randomise(model: Llama, seed: int = 0) -> None:
    """Normal weights, norms one, biases zero: for speed and memory of a shape without a download."""
    dice = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, 0.02, generator=dice)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)


def find_shards(path: Path) -> dict[Path, list[str]]:
    """Shard file → tensor names in it, from the index if there is one. ValueError if a file is missing or no safetensors."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = {}
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
            raise ValueError(f"{index} has no weight_map of tensor names to files; fetch it again")
        for name, file in table.items():
            if PurePosixPath(file).name != file or file in ("", ".", "..") or "\\" in file:
                raise ValueError(f"{index.name} puts {name} into {file!r}, outside the model's directory; refused")
            if not file.endswith(".safetensors"):
                raise ValueError(f"{index.name} names {file!r}; only .safetensors shards are read")
            files.setdefault(path / file, []).append(name)
        for file, names in files.items():
            if not file.is_file():
                raise ValueError(f"{path} lacks the shard {file.name}, which {index.name} names; fetch the model again")
            absent = set(names) - set(_names(file))
            if absent:
                raise ValueError(
                    f"{file.name} lacks {min(absent)}, which {index.name} puts there; fetch the model again"
                )
        return {file: _names(file) for file in files}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [f.name for f in sorted(path.iterdir()) if f.suffix in PICKLES]
        if pickled:
            raise ValueError(
                f"{path} holds only pickled weights ({pickled[0]}), which can run code when read; get the safetensors version"
            )
        raise ValueError(
            f"{path} has no *.safetensors; a model directory holds config.json, *.safetensors and a tokenizer"
        )
    return {file: _names(file) for file in files}


def _names(file: Path) -> list[str]:
    with _open(file) as f:
        return list(f.keys())


def _open(file: Path) -> safe_open:
    """The library checks the header against the file's length; a file that passes can be read whole."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{file} is no whole safetensors file ({str(e).splitlines()[0]}); fetch it again") from None


def targets(model: Llama) -> dict[str, Tensor]:
    """Checkpoint name → the (rows of the) parameter it fills. Names are the hub's; fused matrices are filled part by part."""
    cfg, out = model.config, {}
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    parts = {
        "self_attn.qkv_proj": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "mlp.gate_up_proj": {"mlp.gate_proj": cfg.intermediate_size, "mlp.up_proj": cfg.intermediate_size},
    }
    for name, weight in model.named_parameters():  # a tied head shares the embedding and is not named again
        module, _, kind = name.rpartition(".")
        fused = next((f for f in parts if module.endswith(f)), None)
        if fused is None:
            out[name if name.startswith("lm_head") else f"model.{name}"] = weight
            continue
        prefix = module.removesuffix(fused)
        for part, rows in zip(parts[fused], weight.split(list(parts[fused].values())), strict=True):
            out[f"model.{prefix}{part}.{kind}"] = rows
    return out


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under their checkpoint names, contiguous: what `load` reads back."""
    return {name: t.contiguous() for name, t in targets(model).items()}


def save(model: Llama, path: Path, config: dict) -> None:
    """Write model.safetensors and config.json."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone() for k, v in state_dict(model).items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
