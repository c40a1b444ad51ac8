"""Load safetensors checkpoints strictly: each weight occurs once in the right shape, and no other tensor exists.

Tensors are copied from the memory-mapped shards directly into the allocated model, two at a time. The peak of memory is
the model and two tensors.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from nanokv.backends.base import Ops
from nanokv.files import clipped, is_there, quoted, read_json, reason
from nanokv.model.config import ModelConfig
from nanokv.model.llama import Llama, RMSNorm
from nanokv.model.rope import inverse_frequencies

LazyTensor = tuple[str, tuple[int, ...], Callable[[], Any]]  # checkpoint name, shape, reader of the values
MAX_FREQUENCY = 1e6  # radians per position
FLOATS = ("F64", "F32", "F16", "BF16")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# tensors that other programs store and no model needs: tables, masks, scales of a quantised cache, a head for training
EXTRA = re.compile(
    r"(.*rotary_emb\..*|.*self_attn\.(masked_)?bias|.*self_attn\.[kv]_scale|(model\.)?(causal_mask|position_ids)|v_head\..*)"
)


def empty(config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> Llama:
    """Allocate a model without filling its weights. Norm weights are fp32, all others `dtype`."""
    with torch.device("meta"):
        model = Llama(config, ops).to(dtype)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.float()  # norms work on the fp32 residual stream
    model.to_empty(device=device)
    if config.tie_word_embeddings:  # to_empty allocates a shared parameter twice, so share it again
        model.lm_head.weight = model.embed_tokens.weight
    model.inv_freq = inverse_frequencies(config).to(device)
    if not (model.inv_freq.isfinite() & (model.inv_freq.abs() < MAX_FREQUENCY)).all():
        raise ValueError(
            f"rope_theta {config.rope_theta} and {config.rope_scaling} rotate by angles that are no numbers"
        )
    return model.eval().requires_grad_(False)


def load(
    path: Path, config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype, bar: bool = False
) -> Llama:
    """Load the checkpoint in `path`. ValueError names the file or tensor that is wrong."""
    tensors = list(read(find_shards(path)))
    check_size(config, tensors, str(path))
    model = empty(config, ops, device, dtype)
    fill(model, tensors, str(path), bar)
    return model


def check_size(config: ModelConfig, tensors: Sequence[LazyTensor], where: str) -> None:
    """Before memory is allocated: ValueError if config.json asks for far more layers or weights than there are."""
    held, asked = (
        sum(math.prod(shape) for _, shape, _ in tensors),
        replace(config, tie_word_embeddings=True).parameters(),
    )
    if config.num_hidden_layers > len(tensors) or asked > 2 * held:
        raise ValueError(
            f"{where} holds {len(tensors)} tensors with {held} weights, config.json asks for {config.num_hidden_layers} layers "
            f"with {asked}; does it belong to another model?"
        )


def fill(model: Llama, tensors: Iterable[LazyTensor], where: str, bar: bool = False) -> None:
    """Copy every tensor into the model. ValueError if one is missing, unknown or of another shape.

    Two threads copy: one can copy while the other waits for the disk.
    """
    tensors = list(tensors)
    if not any(name.startswith("model.") for name, *_ in tensors):  # saved without the head's class
        tensors = [(name if name == HEAD else f"model.{name}", *rest) for name, *rest in tensors]
    tensors = _settle_head(model, tensors)
    missing, jobs = targets(model), []
    for name, shape, read_values in tensors:
        if name not in missing:
            raise ValueError(
                f"{where} holds {quoted(name)}, which is not a tensor of this model or occurs twice; "
                "does config.json belong to another model?"
            )
        target = missing.pop(name)
        if shape != tuple(target.shape):
            raise ValueError(f"{where}: {name} has shape {quoted(shape)}, config.json asks for {tuple(target.shape)}")
        jobs.append((target, read_values))
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} tensors, the first is {min(missing)}; fetch the model again")
    for i in model.config.shared_layers:  # rows for keys and values that nobody computes
        for parameter in model.layers[i].self_attn.qkv_proj.parameters():
            parameter.zero_()
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda job: job[0].copy_(torch.as_tensor(job[1]())), jobs)
        list(tqdm(done, total=len(jobs), desc="load", unit="tensor", leave=False, disable=not bar))


def _settle_head(model: Llama, tensors: list[LazyTensor]) -> list[LazyTensor]:
    """Tie the output head to the embedding, or not, by what the checkpoint holds; config.json may be wrong about it.

    If only one of the two is there, it serves as both. If both are there and differ, both are used. Returns the tensors
    to read.
    """
    found = {name: read_values for name, _, read_values in tensors if name in (EMBEDDING, HEAD)}
    tied = model.config.tie_word_embeddings
    if len(found) == 2 and tied:
        one, other = (torch.as_tensor(read_values()) for read_values in found.values())
        tied = torch.equal(one, other.to(one.dtype))
    elif len(found) == 1:
        tied = True
    if tied != model.config.tie_word_embeddings:
        weight = model.embed_tokens.weight
        model.lm_head.weight = weight if tied else torch.nn.Parameter(torch.empty_like(weight), requires_grad=False)
        model.config = replace(model.config, tie_word_embeddings=tied)
    if not tied:
        return tensors
    if EMBEDDING in found:
        return [x for x in tensors if x[0] != HEAD]
    return [(EMBEDDING if name == HEAD else name, shape, read_values) for name, shape, read_values in tensors]


def read(files: dict[Path, list[str]]) -> Iterator[LazyTensor]:
    """Yield (name, shape, reader) for all tensors. Names and shapes come from headers; a reader reads the values."""
    for file, names in files.items():
        with _open(file) as f:
            for name in names:
                if EXTRA.fullmatch(name):
                    continue
                piece = f.get_slice(name)
                if piece.get_dtype() not in FLOATS:
                    raise ValueError(
                        f"{file.name}: {quoted(name)} is {piece.get_dtype()}; weights are one of {', '.join(FLOATS)}"
                    )
                yield name, tuple(piece.get_shape()), partial(_read_tensor, file, name)


def _read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor. The file is opened each time, because an open mapping keeps all pages it has read in memory."""
    with _open(file) as f:
        return f.get_tensor(name)


def copy(model: Llama, ops: Ops, dtype: torch.dtype) -> Llama:
    """Return a copy of the model in another dtype."""
    result = empty(model.config, ops, model.embed_tokens.weight.device, dtype)
    for new, old in zip(result.parameters(), model.parameters(), strict=True):
        new.copy_(old)
    return result


def randomise(model: Llama, seed: int = 0) -> None:
    """Fill a model with random weights, to measure the speed and memory of a shape without a download.

    Matrices are normal with standard deviation 0.02, norm weights are one, biases are zero.
    """
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, 0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)


def find_shards(path: Path) -> dict[Path, list[str]]:
    """Return {shard file: names of its tensors}. As in transformers, model.safetensors comes first, and then what the
    index names. If there is neither, the files that hold this kind of model count; adapters, states of an optimizer and
    weights under other names are passed over.

    ValueError if a file is missing, is not safetensors or lies outside the directory.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if is_there(whole):
        return {whole: _tensor_names(whole)}
    if is_there(index):
        return _indexed_shards(path, index)
    files = sorted(path.glob("model-*-of-*.safetensors")) or sorted(path.glob("*.safetensors"))
    found = {file: _tensor_names(file) for file in files if is_there(file)}
    shards = {file: names for file, names in found.items() if any(map(_is_weight, names))}
    holders: dict[str, Path] = {}
    for file, names in shards.items():
        for name in names:
            if (other := holders.setdefault(name, file)) != file:
                raise ValueError(
                    f"{path}: {other.name} and {file.name} both hold {clipped(name)}; move one of the two away"
                )
    if shards:
        return shards
    raise ValueError(_no_weights(path, found))


def _is_weight(name: str) -> bool:
    """Whether a tensor of this name belongs to a model, and not to an adapter."""
    return name in (HEAD, EMBEDDING.removeprefix("model.")) or (name.startswith("model.") and "lora_" not in name)


def _indexed_shards(path: Path, index: Path) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files; fetch it again")
    for name, file in table.items():
        if PurePosixPath(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise ValueError(
                f"{index.name} puts {clipped(name)} into {quoted(file)}, outside the model's directory; refused"
            )
        if not file.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {quoted(file)}; only .safetensors shards are read")
        files.setdefault(path / file, []).append(name)
    for file, names in files.items():
        if not is_there(file):
            raise ValueError(
                f"{path} lacks the shard {clipped(file.name)}, which {index.name} names; fetch the model again"
            )
        absent = set(names) - set(_tensor_names(file))
        if absent:
            raise ValueError(
                f"{file.name} lacks {clipped(min(absent))}, which {index.name} puts there; fetch the model again"
            )
    return {file: _tensor_names(file) for file in files}


def _no_weights(path: Path, found: dict[Path, list[str]]) -> str:
    """Why the files of this directory, among them these safetensors files, hold no model."""
    for file, names in found.items():
        if any("lora_" in name for name in names):
            return f"{path}: {file.name} is a LoRA adapter, not a model; merge it into its base model, and give that"
        if any(name.startswith("layers.0.attention") for name in names):
            return (
                f"{path}: {file.name} has the names of Mistral's own format; get the repository's model-*.safetensors"
            )
        return f"{path}: {file.name} holds {quoted(min(names, default='nothing'))} and no weights of a supported model"
    pickled = [f.name for f in sorted(path.iterdir()) if f.suffix in PICKLE_SUFFIXES]
    if pickled:
        return f"{path} holds only pickled weights ({pickled[0]}), which can run code when read; get the safetensors version"
    if arrays := [f.name for f in sorted(path.glob("*.npz"))]:
        return f"{path} holds weights in MLX's own format ({arrays[0]}); get the safetensors version"
    return f"{path} has no *.safetensors; a model directory holds config.json, *.safetensors and a tokenizer"


def _tensor_names(file: Path) -> list[str]:
    with _open(file) as f:
        return list(f.keys())


def _open(file: Path) -> safe_open:
    """Open a safetensors file. The library checks the header against the file's length, so an open file is complete."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{file} is not a complete safetensors file ({reason(e)}); fetch it again") from None


def targets(model: Llama) -> dict[str, Tensor]:
    """Return {checkpoint name: the parameter that it fills}. For a fused matrix this is a view of some of its rows. A layer
    that reads another one's keys and values has no tensors for its own.
    """
    cfg, out = model.config, {}
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    parts = {
        "self_attn.qkv_proj": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "mlp.gate_up_proj": {"mlp.gate_proj": cfg.intermediate_size, "mlp.up_proj": cfg.intermediate_size},
    }
    for name, weight in model.named_parameters():  # a tied head is the embedding and is listed only there
        module, _, kind = name.rpartition(".")
        fused = next((f for f in parts if module.endswith(f)), None)
        if fused is None:
            out[name if name.startswith("lm_head") else f"model.{name}"] = weight
            continue
        prefix = module.removesuffix(fused)
        of_reader = prefix in {f"layers.{i}." for i in cfg.shared_layers}
        for part, rows in zip(parts[fused], weight.split(list(parts[fused].values())), strict=True):
            if not (of_reader and part.endswith(("k_proj", "v_proj"))):
                out[f"model.{prefix}{part}.{kind}"] = rows
    return out


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the contiguous weights under their checkpoint names, as `load` reads them."""
    return {name: t.contiguous() for name, t in targets(model).items()}


def save(model: Llama, path: Path, config: dict) -> None:
    """Write model.safetensors and config.json."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone() for k, v in state_dict(model).items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    shutil.copymode(path / "config.json", path / "model.safetensors")  # the library makes it private
