"""The shape of a model, read from config.json. `presets.py` holds the shapes of the named models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanokv.files import clipped, is_there, quoted, read_json

MAX_NUMBER = 2**31  # no size in config.json is this large
MAX_FLOAT = 1e30  # nor any other number: frequencies are fp32


@dataclass(frozen=True)
class Architecture:
    """The values of fields that a config.json of this architecture leaves out, as in transformers."""

    model_type: str
    max_position_embeddings: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", 2048),
    "MistralForCausalLM": Architecture("mistral", 131072, 8),
    "Qwen2ForCausalLM": Architecture("qwen2", 32768, 32),
    "Qwen3ForCausalLM": Architecture("qwen3", 32768, 32, 128),
}

_LATENT = "its attention (MLA) caches one latent vector per token, and no keys and values of heads"
_STATE = "a recurrent state of fixed size takes the place of keys and values, so there is no cache to compress"
OTHERS = {  # how names of architectures and model types begin, without underscores → why such a model cannot run here
    "deepseekv2": _LATENT,
    "deepseekv3": _LATENT,
    "minicpm3": _LATENT,
    "rwkv": _STATE,
    "retnet": _STATE,
    "mamba": _STATE,
}


@dataclass(frozen=True)
class RopeScaling:
    """A rescaling of the rotary frequencies, as in config.json."""

    rope_type: str  # linear | llama3
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. Field names are those of config.json."""

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = field(default=(), repr=False)  # layers to which the window does not apply
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    # layers that were trained to read an earlier layer's keys and values: layer → that layer
    shared_layers: Mapping[int, int] = field(default_factory=dict, repr=False, hash=False)

    @property
    def qk_norm(self) -> bool:
        """Whether each query and key head is normed before it is rotated."""
        return self.model_type == "qwen3"

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer in tokens, the token itself included. None: the layer sees all tokens."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def has_windows(self) -> bool:
        """Whether some layer has a sliding window."""
        return any(self.window(i) for i in range(self.num_hidden_layers))

    @property
    def family(self) -> str:
        """The published model family, because some thresholds are measured per family. "" if it is none of them."""
        if self.model_type != "llama":
            return self.model_type
        families = {
            (32000, 4096): "llama2",
            (128256, 8192): "llama3",
            (128256, 131072): "llama3",
            (49152, 8192): "smollm2",
        }
        return families.get((self.vocab_size, self.max_position_embeddings), "")

    def parameters(self) -> int:
        """The number of weights of a model of this shape, without norms and biases."""
        heads = self.num_attention_heads + self.num_key_value_heads
        layer = 2 * heads * self.head_dim * self.hidden_size + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer

    @classmethod
    def from_dir(cls, path: Path) -> ModelConfig:
        """Read config.json, the EOS ids of generation_config.json, and whether tokenizer_config.json knows of a context
        longer by the factor of linear scaling. ValueError names what is wrong.
        """
        file = path / "config.json"
        config = cls.from_json(read_json(file), str(file))
        extra, words = path / "generation_config.json", path / "tokenizer_config.json"
        if is_there(extra):
            ids = (*config.eos_token_id, *_ids(read_json(extra).get("eos_token_id"), str(extra)))
            config = replace(config, eos_token_id=tuple(dict.fromkeys(ids)))
        scaling = config.rope_scaling
        if is_there(words) and scaling is not None and scaling.rope_type == "linear":
            scaled = config.max_position_embeddings * scaling.factor
            if read_json(words).get("model_max_length") == scaled < MAX_NUMBER:
                config = replace(config, max_position_embeddings=int(scaled))
        return config

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """Check the contents of config.json and build a config. Errors begin with `where`, the name of the file."""
        kind = _architecture(raw, where)
        model_type = kind.model_type
        for key, maker in (("quantization_config", ""), ("quantization", " by MLX")):
            if raw.get(key):
                raise ValueError(
                    f"{where}: the weights are quantised{maker}; use the model's fp16 or bf16 checkpoint, or a .gguf file"
                )
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(
                f"{where}: hidden_act {clipped(str(raw['hidden_act']))} is not supported; supported is silu"
            )

        def number(key: str, default: int | None = None) -> int:
            value = raw.get(key)
            value = _whole(default if value is None else value)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_NUMBER:
                raise ValueError(f"{where}: {key} is {quoted(value)}; it must be a positive whole number below 2^31")
            return value

        def flag(key: str) -> bool:
            value = raw.get(key)
            if value not in (None, True, False):  # 0 and 1 count as such
                raise ValueError(f"{where}: {key} is {quoted(value)}; it must be true or false")
            return bool(value)

        heads, hidden = number("num_attention_heads"), number("hidden_size")
        n_layers, rope = number("num_hidden_layers"), _rope(raw, where)
        kv_heads = (kind.num_key_value_heads or heads) if "num_key_value_heads" not in raw else heads
        config = cls(
            model_type=model_type,
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=n_layers,
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", kv_heads),
            head_dim=number("head_dim", kind.head_dim or hidden // heads),
            max_position_embeddings=_context(
                raw, number("max_position_embeddings", kind.max_position_embeddings), rope.get("rope_scaling"), where
            ),
            rms_norm_eps=_float(raw, "rms_norm_eps", 1e-6, where),
            tie_word_embeddings=flag("tie_word_embeddings"),
            **_windows(raw, model_type, n_layers, flag("use_sliding_window"), where),
            qkv_bias=model_type == "qwen2" or (model_type != "mistral" and flag("attention_bias")),
            o_bias=model_type in ("llama", "qwen3") and flag("attention_bias"),
            mlp_bias=model_type == "llama" and flag("mlp_bias"),
            bos_token_id=next(iter(_ids(raw.get("bos_token_id"), where)), None),
            eos_token_id=_ids(raw.get("eos_token_id"), where),
            shared_layers=_shared(n_layers, number("cla_share_factor", 1)) if flag("use_cla") else {},
            **rope,
        )
        if heads % config.num_key_value_heads:
            raise ValueError(
                f"{where}: {heads} query heads cannot share {config.num_key_value_heads} key/value heads evenly"
            )
        if any(config.window(i) != config.window(owner) for i, owner in config.shared_layers.items()):
            raise ValueError(f"{where}: by cla_share_factor layers share a cache that have different sliding windows")
        if config.head_dim % 2:
            raise ValueError(f"{where}: head_dim is {config.head_dim}; rotary positions need an even one")
        return config


def _shared(n_layers: int, factor: int) -> dict[int, int]:
    """Cross-layer attention (Brandon et al. 2024, arXiv:2405.12981) with the fields that Hunyuan's config.json has for it:
    of each `factor` layers the first one has keys and values, and the others read them.
    """
    return {i: i - i % factor for i in range(n_layers) if i % factor}


def _whole(value: Any) -> Any:
    """A whole number that is written as 512.0 as an int; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _float(raw: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """Return a positive number of config.json."""
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < MAX_FLOAT:
        raise ValueError(f"{where}: {key} is {quoted(value)}; it must be a positive number")
    return float(value)


def _architecture(raw: Mapping[str, Any], where: str) -> Architecture:
    """The first supported one of `architectures`, and of several the one of model_type. Without a list, model_type decides."""
    listed, model_type = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{where}: architectures is {quoted(listed)}; it must be a list of names")
    known = {name.lower(): kind for name, kind in ARCHITECTURES.items()}  # old files write LLaMAForCausalLM
    found = [known[name.lower()] for name in listed if name.lower() in known] if listed else list(known.values())
    chosen = next((kind for kind in found if kind.model_type == model_type), found[0] if listed and found else None)
    if chosen is None:
        name = clipped(listed[0]) if listed else f"model_type {clipped(str(model_type))}"
        plain = (listed[0] if listed else str(model_type)).lower().replace("_", "")
        reason = next((f" ({why})" for start, why in OTHERS.items() if plain.startswith(start)), "")
        raise ValueError(
            f"{where}: architecture {name} is not supported{reason}; supported are {', '.join(ARCHITECTURES)}"
        )
    return chosen


def _context(raw: Mapping[str, Any], length: int, scaling: RopeScaling | None, where: str) -> int:
    """The context in tokens. Under linear scaling some files give the length before scaling and others the one after
    it. So the factor counts only if another field names the longer length.
    """
    if scaling is None or scaling.rope_type != "linear":
        return length
    stated = (raw.get("rope_scaling") or raw.get("rope_parameters") or {}).get("original_max_position_embeddings")
    scaled = length * scaling.factor
    if isinstance(stated, int) and MAX_NUMBER > stated > length / scaling.factor:
        scaled = stated * scaling.factor
    elif scaled not in (raw.get("max_sequence_length"), raw.get("model_max_length")):
        return length
    if not scaled < MAX_NUMBER:
        raise ValueError(f"{where}: rope_scaling makes a context of {scaled:.0f} tokens; it must be less than 2^31")
    return int(scaled)


def _windows(raw: Mapping[str, Any], model_type: str, n_layers: int, uses_window: bool, where: str) -> dict[str, Any]:
    """Read the sliding window, and which layers it leaves out."""
    if model_type == "llama" or (model_type != "mistral" and not uses_window):
        return {}
    value = _whole(raw.get("sliding_window", 4096))  # Mistral v0.1 relies on this default; later versions write null
    if value is None:
        return {}
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_NUMBER:
        raise ValueError(f"{where}: sliding_window is {quoted(value)}; it must be a positive whole number or null")
    if model_type == "mistral":
        return {"sliding_window": value}
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ValueError(f"{where}: max_window_layers is {quoted(first)}; it must be a whole number")
        full = range(min(first, n_layers))
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != n_layers or any(t not in known for t in types):
            raise ValueError(f"{where}: layer_types must name {' or '.join(known)} for each of {n_layers} layers")
        full = [i for i, t in enumerate(types) if t == "full_attention"]
    return {} if len(full) == n_layers else {"sliding_window": value, "full_attention_layers": tuple(full)}


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """Return token ids that are written as a number, a list of numbers or null. Some files write −1 for none."""
    ids = [_whole(i) for i in (value if isinstance(value, list) else [value]) if i is not None]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{where}: token id {quoted(value)} must be a number or a list of numbers")
    return tuple(i for i in ids if i >= 0)


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the rotary settings: the older rope_scaling if it is there, as in transformers, or rope_parameters. Each may
    hold rope_theta, and then that one counts; otherwise it stands beside them.
    """
    found = {name: raw.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    if not all(isinstance(x, dict) for x in found.values()):
        raise ValueError(f"{where}: rope_scaling must be an object with rope_type and factor")
    if raw.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor is not supported; rotary positions must cover the whole head")
    scaling = found["rope_scaling"] or _one_kind(found["rope_parameters"], where)
    settings = {"rope_theta": 10000.0} | {k: v for x in (raw, scaling) for k, v in x.items() if v is not None}
    theta = _float(settings, "rope_theta", 10000.0, where)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"{where}: rope_scaling type {quoted(kind)} is not supported; supported are default, linear, llama3"
        )
    required = ("factor",) if kind == "linear" else tuple(RopeScaling.__dataclass_fields__)[1:]
    missing = [k for k in required if k not in scaling]
    if missing:
        raise ValueError(f"{where}: rope_scaling {kind} lacks {', '.join(missing)}")
    values = {k: _float(scaling, k, 0, where) for k in required}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(kind, **values)}


def _one_kind(parameters: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """rope_parameters may hold an object per kind of layer (full_attention, sliding_attention); all must be alike."""
    if not parameters or not all(isinstance(x, dict) for x in parameters.values()):
        return parameters
    first, *others = parameters.values()
    if any(x != first for x in others):
        raise ValueError(f"{where}: rope_parameters differ between kinds of layers, which is not supported")
    return first
