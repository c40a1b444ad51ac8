"""A tiny GGUF file, and where the numbers of its header stand, to put others there."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
from fuzz.mutate import NUMBERS
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the scalar types
TEXT, ARRAY = 8, 9


def altered_gguf(data: bytes, dice: random.Random) -> bytes:
    """The file with another count, length, type, offset or value."""
    data, places = bytearray(data), list(_places(data))
    for _ in range(dice.choice((1, 1, 2))):
        wanted = dice.choice(sorted({kind for _, _, kind in places}))
        at, size, kind = dice.choice([place for place in places if place[2] == wanted])
        if kind.startswith("type"):
            number = dice.randrange(14)
        elif dice.random() < 0.5:
            number = dice.choice(NUMBERS)
        else:
            number = int.from_bytes(data[at : at + size], "little") + dice.choice((-32, -1, 1, 32))
        data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(data)


def _places(data: bytearray):
    """(offset, bytes, kind) of every number of the header."""
    at = 24
    yield from ((4, 4, "version"), (8, 8, "tensors"), (16, 8, "values"))
    n_tensors, n_values = struct.unpack_from("<QQ", data, 8)
    for _ in range(n_values):
        yield at, 8, "length of a key"
        at += 8 + struct.unpack_from("<Q", data, at)[0]
        yield at, 4, "type"
        (kind,) = struct.unpack_from("<I", data, at)
        places, at = _value(data, at + 4, kind)
        yield from places
    for _ in range(n_tensors):
        yield at, 8, "length of a name"
        yield at + 8, 1, "letter of a name"
        at += 8 + struct.unpack_from("<Q", data, at)[0]
        yield at, 4, "dimensions"
        (dims,) = struct.unpack_from("<I", data, at)
        at += 4
        yield from ((at + 8 * i, 8, "dimension") for i in range(dims))
        yield at + 8 * dims, 4, "type of a tensor"
        yield at + 8 * dims + 4, 8, "offset"
        at += 8 * dims + 12


def _value(data: bytearray, at: int, kind: int) -> tuple[list, int]:
    if kind == TEXT:
        return [(at, 8, "length of a text")], at + 8 + struct.unpack_from("<Q", data, at)[0]
    if kind != ARRAY:
        return [(at, SIZES[kind], "value")], at + SIZES[kind]
    inner, n = struct.unpack_from("<IQ", data, at)
    found, end = [(at, 4, "type of a list"), (at + 4, 8, "length of a list")], at + 12
    for i in range(n):
        places, end = _value(data, end, inner)
        if i < 4:  # of long lists only the first entries
            found += places
    return found, end


def write_gguf(file: Path, template: str) -> None:
    """A tiny llama model with a byte-level vocabulary."""
    special, hidden, inner = ["<s>", "</s>"], 32, 64
    tokens = special + sorted(ByteLevel.alphabet()) + ["Ġt", "he"]
    meta = {
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5e4,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": ["Ġ t", "h e"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": template,
    }
    writer = GGUFWriter(file, "llama")
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in meta.items():
        add.get(type(value), writer.add_array)(key, value)
    layer = {
        "attn_q": (hidden, hidden),
        "attn_k": (16, hidden),
        "attn_v": (16, hidden),
        "attn_output": (hidden, hidden),
    }
    layer |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    layer |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    numbers = np.random.default_rng(3)
    for name, shape in shapes.items():
        value = (0.3 * numbers.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0 if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
