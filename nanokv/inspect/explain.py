"""What was kept, drawn: a line per layer over the text's positions, the text itself greyed by what was forgotten, and, before
anything is loaded, what each policy would keep. Reads stores only through `unpack`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import torch

from nanokv.cache.plan import Plan
from nanokv.cache.report import mib
from nanokv.engine import Session
from nanokv.model.config import ModelConfig

SHADES = " ░▒▓█"


def explain(session: Session, width: int = 64) -> str:
    """Per layer: how many tokens its heads hold, and where they lie; a cell's shade is the share of its (head, token) pairs kept."""
    cache, lines = session.cache, []
    for row, seen in enumerate(session.seen):
        cell = max(1, -(-seen // width))
        lines.append(f"row {row}: {seen} tokens, {cell} per cell; {SHADES[0]!r} none kept … {SHADES[-1]!r} all kept")
        for layer in range(len(cache.layers)):
            owner = cache.plan.owner(layer)
            if owner != layer:
                lines.append(f"layer {layer:3}  reads layer {owner}'s")
                continue
            parts = cache.stores[owner].unpack()[row].parts
            counts = cache.stores[owner].length[row].tolist()
            held = [0] * -(-seen // cell)
            for kept in parts:
                for pos, n in zip(kept.pos[0].tolist(), kept.length[0].tolist(), strict=True):
                    for p in pos[:n]:
                        held[p // cell] += 1
            strip = "".join(_shade(h, len(counts) * min(cell, seen - i * cell)) for i, h in enumerate(held))
            span = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"
            lazy = f"  score {cache.scores[owner][row]:.2f}" if cache.scores[owner][row] else ""
            lines.append(f"layer {layer:3}  {span:>9}  |{strip}|{lazy}")
    return "\n".join(lines)


def _shade(held: int, of: int) -> str:
    return SHADES[-(-held * (len(SHADES) - 1) // of)]


def xray(session: Session, pieces: Sequence[str], row: int = 0) -> str:
    """An HTML page: each piece of the text as dark as the share of (layer, head) pairs that still hold it; hover for the layers."""
    cache, seen = session.cache, session.seen[row]
    held, where = torch.zeros(seen), [[] for _ in range(seen)]
    for owner, store in cache.stores.items():
        heads, layer = store.length.shape[1], set()
        for kept in store.unpack()[row].parts:
            for pos, n in zip(kept.pos[0], kept.length[0].tolist(), strict=True):
                held[pos[:n].long().cpu()] += 1 / heads / len(cache.stores)
                layer |= set(pos[:n].tolist())
        for p in layer:
            where[p].append(owner)
    spans = []
    for piece, share, layers in zip(pieces[:seen], held.tolist(), where, strict=False):
        tip = f"{share:.0%} · layers {', '.join(map(str, layers)) or 'none'}"
        grey = int(215 * (1 - share))
        spans.append(f'<span title="{tip}" style="color:rgb({grey},{grey},{grey})">{html.escape(piece)}</span>')
    style = "body{font:16px/1.6 monospace;max-width:60em;margin:2em auto;white-space:pre-wrap;background:#fff}"
    head = f"{html.escape(str(session.plans[row]))}\n{html.escape(str(session.report()))}\n\n"
    return f"<!doctype html><meta charset=utf-8><title>nanokv x-ray</title><style>{style}</style><body>{head}{''.join(spans)}</body>\n"


def sizes(config: ModelConfig, plans: dict[str, Plan], n: int, room: int, dtype: torch.dtype, free: int) -> list[str]:
    """A table of what each plan keeps of n tokens: tokens per KV head, bytes with room for `room` more, whether that fits `free`."""
    n_layers = config.num_hidden_layers
    full = n_layers * (n + room) * config.num_key_value_heads * 2 * config.head_dim * dtype.itemsize
    lines = [
        f"{n} tokens of prompt and {room} new ones; weights {mib(config.parameters() * dtype.itemsize)}, {mib(free)} free"
    ]
    for name, plan in plans.items():
        plan = plan.sketch(n_layers)
        try:
            plan = plan.fit(config, dtype, n, room)
        except ValueError as e:
            lines.append(f"{name:12} {e}")
            continue
        size = int((n_layers - len(plan.share)) * plan.held(config, dtype, n, room))
        kept = n if plan.keep.demotes else plan.keep.holds(n)
        fits = "fits" if size + config.parameters() * dtype.itemsize <= free else "does not fit"
        lines.append(f"{name:12} at most {kept:>7} tokens per head  {mib(size):>10}  {full / size:5.1f}x  {fits}")
    return lines
