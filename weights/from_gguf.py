"""Convert GGUF files of the llama, qwen2 and qwen3 architectures to the Hugging Face format.

Weights are dequantised, llama.cpp's permutation of the Q and K rows of llama is undone, and the tokenizer is rebuilt from the
metadata. The `gguf` library reads the file. This module does not import nanokv.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weights.gguf_header import check

Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # Hugging Face name, shape, reader of the values

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PERMUTED = ("llama",)  # architectures whose Q and K rows llama.cpp's converter reorders

# llama.cpp's pre-tokenizer name → the pattern that splits text before byte-level BPE. "digits" makes each digit a
# piece, None uses GPT-2's pattern. The patterns are those of the original tokenizers
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE: dict[str, str | None] = {
    "smollm": "digits",
    "default": None,
    "gpt-2": None,
    **dict.fromkeys(LLAMA3, _LLAMA3),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
MAX_TOKEN = 512  # characters; rebuilding sentencepiece's merges takes their square
NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5  # GGUF token types; 6 is a byte token


class GGUF:
    """An open GGUF file, with the other parts if the model is split. ValueError if one cannot be read or is not of a
    supported architecture.
    """

    def __init__(self, file: Path):
        self.file, self.notes = file, []  # what had to be guessed, one sentence each
        self.meta, tensors = _read(file)
        count = self._of_type("split.count", int, 1)
        if count > 1:
            parts = [_read(part) for part in _parts(file, count)]
            self.meta, tensors = parts[0][0], [t for _, found in parts for t in found]
        kind = self._of_type("general.type", str, "model")
        if kind != "model":
            name = "a LoRA adapter" if kind == "adapter" else f"of type {_short(kind)!r}"
            raise ValueError(f"{file} is {name}, not a model; give the file of the whole model")
        self.arch = self._of_type("general.architecture", str, "")
        if self.arch not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ValueError(
                f"{file}: architecture {_short(self.arch)} is not supported in GGUF; supported are {supported}"
            )
        self.tensors_by_name = {t.name: t for t in tensors}
        if len(self.tensors_by_name) < len(tensors):
            raise ValueError(f"{file} and its other parts hold a tensor twice; fetch them again")
        self.tokens = self._list("tokens", str)
        self.pre = self._of_type("tokenizer.ggml.pre", str, "") or self._guess_pre()

    def _get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value. ValueError if it is missing and has no default."""
        value = self.meta.get(key, default)
        if value is None:
            raise ValueError(f"{self.file}: the metadata lacks {key}; convert the model again with a current llama.cpp")
        return value

    def _of_type(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a metadata value. ValueError if it is of another type."""
        value = self._get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.file}: {key} is {_short(value)}; it must be a {kind.__name__}")
        return value

    def _list(self, name: str, kind: type) -> list:
        """Return a list of the tokenizer's metadata. ValueError if it holds something else, or tokens of which one is too
        long or occurs twice.
        """
        key = f"tokenizer.ggml.{name}"
        values = self._of_type(key, list)
        if not all(isinstance(x, kind) for x in values):
            raise ValueError(f"{self.file}: {key} holds other values than {kind.__name__}")
        if name == "tokens" and (len(set(values)) < len(values) or max(map(len, values), default=0) > MAX_TOKEN):
            raise ValueError(f"{self.file}: {key} has a token twice, or one of more than {MAX_TOKEN} characters")
        return values

    def _number(self, key: str, default: float | None = None, kind: type = int) -> Any:
        """Return a positive number from the metadata."""
        value = self._get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and value and all(x == value[0] for x in value):  # the same for every layer
            value = value[0]
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(
                f"{self.file}: {self.arch}.{key} is {_short(value)}; it must be a positive {kind.__name__}"
            )
        return value

    def _token(self, name: str) -> int | None:
        """Return the id of a special token, or None if the file names none. Of other names than bos and eos, an id beyond
        the tokens counts as none, as in llama.cpp.
        """
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.meta:
            return None
        i = self._of_type(key, int)
        if 0 <= i < len(self.tokens):
            return i
        if name in ("bos", "eos"):
            raise ValueError(f"{self.file}: {key} is {i}; the file has {len(self.tokens)} tokens")
        return None

    def _per_token(self, key: str, kind: type) -> list:
        """Return a metadata list. ValueError unless it has one entry per token."""
        values, size = self._list(key, kind), len(self.tokens)
        if len(values) != size:
            raise ValueError(f"{self.file}: tokenizer.ggml.{key} has {len(values)} entries for {size} tokens")
        return values

    def _guess_pre(self) -> str:
        """The pre-tokenizer of a byte-level vocabulary whose file names none, as old converters wrote them."""
        if self.arch in ("qwen2", "qwen3"):
            guess = "qwen2"
        else:
            guess = LLAMA3[0] if "<|begin_of_text|>" in self.tokens else "default"
        if self.meta.get("tokenizer.ggml.model") == "gpt2":
            self.notes.append(
                f"{self.file.name} does not say how it splits text (tokenizer.ggml.pre); "
                f"{guess} is assumed, by its architecture and tokens"
            )
        return guess

    def _vocab_size(self) -> int:
        """The rows of the embedding, of which the last may belong to no token."""
        embedding = self.tensors_by_name.get("token_embd.weight")
        return len(self.tokens) if embedding is None else int(embedding.shape[-1])

    def config(self) -> dict[str, Any]:
        """Return the contents of config.json."""
        heads, hidden = self._number("attention.head_count"), self._number("embedding_length")
        dim = self._number("attention.key_length", hidden // heads)
        if self._number("rope.dimension_count", dim) != dim:
            raise ValueError(
                f"{self.file}: {self.arch}.rope.dimension_count is not the head dimension {dim}; "
                "partial rotation is not supported"
            )
        eps = self._number("attention.layer_norm_rms_epsilon", kind=float)
        raw = {
            "architectures": [ARCHITECTURES[self.arch]],
            "model_type": self.arch,
            "hidden_act": "silu",
            "vocab_size": self._vocab_size(),
            "mlp_bias": self.arch == "llama" and "blk.0.ffn_up.bias" in self.tensors_by_name,
            "attention_bias": self.arch != "qwen2" and "blk.0.attn_q.bias" in self.tensors_by_name,
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": dim,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": float(f"{eps:.6g}"),  # stored as fp32: 9.9999997e-06
            "rope_theta": self._number("rope.freq_base", 10000.0, float),
            "tie_word_embeddings": "output.weight" not in self.tensors_by_name,
            "bos_token_id": self._token("bos"),
            "eos_token_id": self._eos_ids(),
        }
        raw["rope_scaling"] = self._scaling(raw)
        return raw

    def _eos_ids(self) -> list[int]:
        """Return every id that ends a text: those of the metadata, and the markers that end a turn of a chat."""
        ids = [i for i in map(self._token, ("eos", "eot", "eom")) if i is not None]
        ends = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
        ids += [self.tokens.index(t) for t in ends if t in self.tokens]
        return list(dict.fromkeys(ids))

    def _scaling(self, raw: dict[str, Any]) -> dict[str, Any] | None:
        """Return rope_scaling for config.json, or None. ValueError if the scaling is not supported."""
        kind = self._of_type(f"{self.arch}.rope.scaling.type", str, "")
        freqs, old = self.tensors_by_name.get("rope_freqs.weight"), self.meta.get(f"{self.arch}.rope.scale_linear")
        factor = self.meta.get(f"{self.arch}.rope.scaling.factor", old)
        if not kind and factor not in (None, 0.0, 1.0):
            kind = "linear"
        if kind == "linear" and freqs is None:
            found = {"rope_type": "linear", "factor": self._number("rope.scaling.factor", factor, float)}
            if f"{self.arch}.rope.scaling.original_context_length" not in self.meta:
                return found
            return {**found, "original_max_position_embeddings": self._number("rope.scaling.original_context_length")}
        if kind not in ("none", ""):
            both = " with rope_freqs" if kind == "linear" else ""
            raise ValueError(
                f"{self.file}: rope scaling {_short(kind)}{both} is not supported; supported are none, linear, llama3"
            )
        if freqs is None:
            return None
        # Llama 3.1 and later store one divisor per frequency: recover the factor and check the llama3 rule
        divisors = np.asarray(freqs.data, dtype=np.float32)
        rule = {
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        inv = raw["rope_theta"] ** (-np.arange(0, raw["head_dim"], 2) / raw["head_dim"])
        ramp = ((rule["original_max_position_embeddings"] * inv / (2 * math.pi) - 1.0) / 3.0).clip(0, 1)
        expected = 1 / ((1 - ramp) / rule["factor"] + ramp)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise ValueError(
                f"{self.file}: its rope_freqs do not follow the llama3 rule, the only one supported; "
                "use the safetensors version"
            )
        return {"rope_type": "llama3", **rule}

    def tensors(self) -> Iterator[Tensor]:
        """Yield (Hugging Face name, shape, reader) for every weight. Values are read when the reader is called."""
        heads = self._number("attention.head_count")
        permuted = {"attn_q": heads, "attn_k": self._number("attention.head_count_kv", heads)}
        permuted = permuted if self.arch in PERMUTED else {}
        for name, tensor in self.tensors_by_name.items():
            if name == "rope_freqs.weight" or name.endswith(".attn_rot_embd"):
                continue  # tables of the rotation
            shape = tuple(int(n) for n in reversed(tensor.shape))
            if name in OTHER_NAMES:
                yield OTHER_NAMES[name], shape, lambda t=tensor, s=shape: self._values(t, s)
                continue
            blk, _, rest = name.partition(".")
            layer, _, rest = rest.partition(".")
            part, _, kind = rest.rpartition(".")
            if blk != "blk" or part not in LAYER_NAMES:
                raise ValueError(
                    f"{self.file} has a tensor {_short(name)}, which the {self.arch} architecture does not have"
                )
            n = permuted.get(part)
            yield (
                f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}",
                shape,
                lambda t=tensor, s=shape, n=n: unpermute(self._values(t, s), n),
            )

    def _values(self, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return the dequantised values of a tensor."""
        from gguf.quants import dequantize

        try:
            value = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except NotImplementedError:  # how the gguf library says that it cannot dequantise a format
            kind = tensor.tensor_type.name
            raise ValueError(
                f"{self.file}: {tensor.name} is {kind}, which cannot be read; use another quantisation of the model"
            ) from None
        return np.require(value, requirements="W")  # fp32 data is a read-only view, and torch warns about those

    def tokenizer_json(self) -> str:
        """Return tokenizer.json, the format of the tokenizers library."""
        kind = self._of_type("tokenizer.ggml.model", str, "")
        build = {"gpt2": self._byte_level, "llama": self._sentencepiece}.get(kind)
        if build is None:
            raise ValueError(
                f"{self.file}: tokenizer {_short(kind)} is not supported; supported are gpt2 (byte-level BPE) and llama (sentencepiece)"
            )
        try:
            return self._add_tokens(build())
        except (ValueError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library raises bare Exception, and panics that are none
            raise ValueError(f"{self.file}: its tokenizer cannot be rebuilt ({_reason(e)}); fetch it again") from None

    def _byte_level(self) -> Any:
        """Build a byte-level BPE tokenizer."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        pre = self.pre
        if pre not in PRE:
            raise ValueError(
                f"{self.file}: pre-tokenizer {_short(pre)} is not supported; supported are {', '.join(PRE)}"
            )
        vocab = {t: i for i, t in enumerate(self.tokens)}
        merges = [tuple(m.split(" ", 1)) for m in self._list("merges", str)]
        tok = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in LLAMA3))
        if PRE[pre] == _QWEN2:
            tok.normalizer = normalizers.NFC()  # as in Qwen's own tokenizer.json
        rule, first = PRE[pre], []
        if rule == "digits":
            first = [pre_tokenizers.Digits(individual_digits=True)]
        elif rule is not None:
            first = [pre_tokenizers.Split(Regex(rule), "isolated")]
        gpt2_pattern = rule in (None, "digits")
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_pattern)]
        )
        tok.decoder = decoders.ByteLevel()
        return tok

    def _sentencepiece(self) -> Any:
        """Build a BPE tokenizer that gives the same ids as sentencepiece."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        scores, types = self._per_token("scores", float), self._per_token("token_type", int)
        vocab = {t: i for i, t in enumerate(self.tokens)}
        joinable = {t: i for t, i in vocab.items() if types[i] in (NORMAL, UNUSED)}
        pairs = []  # sentencepiece joins the pair with the best-scored result first: sort the merges in that order
        for piece, i in joinable.items():
            for a, b in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))):
                if a in joinable and b in joinable:
                    pairs.append((-scores[i], joinable[a], joinable[b], a, b))
        merges = [(a, b) for *_, a, b in sorted(pairs)]
        unk = self.tokens[self._token("unknown") or 0]
        tok = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
        prefix = [normalizers.Prepend("▁")] if self._of_type("tokenizer.ggml.add_space_prefix", bool, True) else []
        tok.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        return tok

    def _add_tokens(self, tok: Any) -> str:
        """Add control tokens (found in the text, hidden when decoding) and user tokens. Returns tokenizer.json."""
        from tokenizers import AddedToken

        types = (
            self._per_token("token_type", int)
            if "tokenizer.ggml.token_type" in self.meta
            else [NORMAL] * len(self.tokens)
        )
        typed = list(zip(self.tokens, types, strict=True))
        special = [t for t, kind in typed if kind in (UNKNOWN, CONTROL)]
        tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        users = [t for t, kind in typed if kind == USER]
        tok.add_tokens([AddedToken(t, normalized=False) for t in users])
        return tok.to_str()

    def tokenizer_config(self) -> dict[str, Any]:
        """Return the contents of tokenizer_config.json."""
        meta, names = self.meta, {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        named = {name: self._token(key) for key, name in names.items()}
        raw = {f"{name}_token": self.tokens[i] for name, i in named.items() if i is not None}
        # like llama.cpp: if the file does not say, sentencepiece and Llama 3 texts begin with BOS
        default = meta.get("tokenizer.ggml.model") == "llama" or self.pre in LLAMA3
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class that reads tokenizer.json as it is
        raw["add_bos_token"] = self._of_type("tokenizer.ggml.add_bos_token", bool, default)
        if "tokenizer.chat_template" in meta:
            raw["chat_template"] = self._of_type("tokenizer.chat_template", str)
        return raw

    def write_texts(self, path: Path) -> None:
        """Write config.json, tokenizer.json and tokenizer_config.json."""
        (path / "config.json").write_text(json.dumps(self.config(), indent=1), encoding="utf-8")
        (path / "tokenizer.json").write_text(self.tokenizer_json(), encoding="utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(self.tokenizer_config(), indent=1), encoding="utf-8")


def _read(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """The metadata and the tensors of one file."""
    from gguf import GGUFReader

    try:
        check(file)
        reader = GGUFReader(file)
        return {k: f.contents() for k, f in reader.fields.items()}, reader.tensors
    except Exception as e:  # a damaged header fails in numpy, struct or the reader, each with its own type
        raise ValueError(f"{file} is not a complete GGUF file ({_reason(e)}); fetch it again") from None


def _reason(e: BaseException) -> str:
    """The first line of an exception's message."""
    return _short(next(iter(str(e).splitlines()), type(e).__name__))


def _short(value: Any) -> str:
    """A value of a file as it stands in a sentence: printable, and not too long."""
    text = value[:161] if isinstance(value, str) else repr(value[:20] if isinstance(value, list) else value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 160 else f"{text[:160]}…"


def _parts(file: Path, count: int) -> list[Path]:
    """All parts of a split model, in order, from the path of one: NAME-00001-of-00003.gguf and so on."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"{file} is one of {count} parts and has another name than NAME-00001-of-{count:05}.gguf; rename the parts"
        )
    parts = [file.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"{file} is one of {count} parts, and {missing[0]} is not beside it; fetch it too")
    return parts


def unpermute(x: np.ndarray, heads: int | None) -> np.ndarray:
    """Undo llama.cpp's order of Q or K rows: from adjacent rotary pairs to two halves. heads=None changes nothing."""
    if heads is None:
        return x
    return x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def convert(file: Path, path: Path, bar: bool = False) -> None:
    """Convert a .gguf file to a model directory: model.safetensors, two config files and tokenizer.json.

    Matrices are stored in fp16 if their values fit, vectors in fp32.
    """
    from safetensors.numpy import save_file
    from tqdm import tqdm

    model = GGUF(file)
    path.mkdir(parents=True, exist_ok=True)
    model.write_texts(path)
    out = {}
    for name, shape, read in tqdm(list(model.tensors()), desc="unpack", unit="tensor", leave=False, disable=not bar):
        value = read()
        use_fp16 = len(shape) > 1 and np.abs(value).max() < 65504
        out[name] = np.ascontiguousarray(value, dtype=np.float16 if use_fp16 else np.float32)
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(path / "config.json", path / "model.safetensors")  # the library makes it private
