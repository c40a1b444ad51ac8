"""Whether a row that was read from a file can be one that a cache has left."""

from __future__ import annotations

from typing import Any

import torch

from nanokv.cache.kept import Kept

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of keys and values


def check_row(row: Kept, config: Any, seen: int, sinks: int) -> None:
    """ValueError unless a text of `seen` tokens can have left this row, in which heads have at most so many sinks."""
    heads, n = config.num_key_value_heads, row.pos.shape[-1]
    rows = {"k": (1, heads, n, config.head_dim), "v": (1, heads, n, config.head_dim), "running_scores": (1, heads, n)}
    numbers = {"pos": (1, heads, n), **dict.fromkeys(("length", "limit", "sink"), (1, heads))}
    for name, shape in (rows | numbers).items():
        x = getattr(row, name)
        if x is None:
            continue  # running_scores: only some policies have them
        kinds = (torch.int32,) if name in numbers else (torch.float32,) if name == "running_scores" else FLOATS
        if x.shape != shape or x.dtype not in kinds:
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}")
        if name in rows and not x.isfinite().all():
            raise ValueError(f"{name} holds values that are no numbers")
    valid = torch.arange(n, device=row.pos.device) < row.length[..., None]
    later = (row.pos.diff(dim=-1) > 0) | ~valid[..., 1:]
    running = row.running_scores if row.running_scores is not None else torch.zeros(1)
    right = {
        "running_scores": running >= 0,
        "length": (row.length >= 0) & (row.length <= n),
        "limit": (row.limit == -1) | ((row.limit >= row.length) & (row.limit > row.sink)),
        "sink": (row.sink >= 0) & (row.sink <= sinks),
        "pos": torch.where(valid, (row.pos >= 0) & (row.pos < seen), row.pos == -1),
        "order of pos": later,
    }
    for name, holds in right.items():
        if not holds.all():
            raise ValueError(f"{name} is out of range")
