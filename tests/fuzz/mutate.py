"""Damage to files: of bytes, of JSON documents and of GGUF headers."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 10**7, 10**9, 2**62, 2**63, 2**64 - 1)
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 1.5, 0.0, -0.0, 1e308, 10**40, -(10**400), 10**9, 2**31, 2**63, 2**64,
    "", "x", "true", "0", "nan", "é" * 50, "x" * 5000, "\x00", "\ud800", "../x", "/dev/zero",
    [], {}, [None], [[[]]], [0], [1, 2], ["a"], [{}], {"a": 1}, {"content": "x"}, {"content": None}, {"": {}}, {"0": 0},
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Bytes that were flipped, cut off, put in, taken out, or replaced by a number."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at, kind = dice.randrange(len(data) or 1), dice.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = dice.randbytes(dice.choice((1, 4, 8, 100)))
        elif kind == 3:
            del data[at : at + dice.choice((1, 4, 8, 100))]
        elif kind == 4:
            data[at : at + 8] = struct.pack("<Q", dice.choice(NUMBERS))
        else:
            data[at : at + 4] = struct.pack("<I", dice.choice(NUMBERS) % 2**32)
    return bytes(data)


def altered(document: Any, dice: random.Random) -> Any:
    """A JSON document (it is changed in place) in which values were replaced, keys removed or renamed."""
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        holder, key = dice.choice(list(_places(document)) or [(None, None)])
        kind = dice.randrange(10)
        if holder is None:
            return copy.deepcopy(dice.choice(VALUES))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[dice.choice(("x", "", "0", key + "x", "rope_scaling", "__class__"))] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key]]
        elif kind == 3:
            other, there = dice.choice(list(_places(document)))
            holder[key] = json.loads(json.dumps(other[there]))
        else:
            holder[key] = copy.deepcopy(dice.choice(VALUES))
    return document


def _places(document: Any) -> Any:
    """(object or list, key or index) of every value; of long lists only a few."""
    keys = (
        list(document)
        if isinstance(document, dict)
        else range(min(len(document), 8))
        if isinstance(document, list)
        else ()
    )
    for key in keys:
        yield document, key
        yield from _places(document[key])


def written(document: Any, dice: random.Random) -> bytes:
    """A JSON document as text, sometimes damaged as bytes too."""
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    return damaged(text, dice) if dice.random() < 0.15 else text
