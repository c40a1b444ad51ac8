"""The text as a page that shows which tokens a cache still holds (--xray)."""

from __future__ import annotations

import html
from collections.abc import Sequence

from nanokv.engine import Session
from nanokv.inspect.explain import held_positions


def xray(session: Session, pieces: Sequence[str], row: int = 0) -> str:
    """The text as an HTML page. A piece is darker the more (layer, head) pairs still hold it; its tooltip names the
    layers.
    """
    cache, seen = session.cache, session.seen[row]
    # by position: how many (layer, head) pairs hold it, and which layers
    kept, layers = [0] * seen, [set() for _ in range(seen)]
    for owner in cache.stores:
        for positions in held_positions(session, owner, row):
            for p in positions:
                kept[p] += 1
                layers[p].add(owner)
    pairs = sum(store.length.shape[1] for store in cache.stores.values())
    spans = []
    for piece, n, holders in zip(pieces[:seen], kept, layers, strict=False):
        share = n / pairs
        tip = f"{share:.0%} · layers {', '.join(map(str, sorted(holders))) or 'none'}"
        grey = int(215 * (1 - share))
        spans.append(f'<span title="{tip}" style="color:rgb({grey},{grey},{grey})">{html.escape(piece)}</span>')
    style = "body{font:16px/1.6 monospace;max-width:60em;margin:2em auto;white-space:pre-wrap;background:#fff}"
    head = f"{html.escape(str(session.plans[row]))}\n{html.escape(str(session.report()))}\n\n"
    return f"<!doctype html><meta charset=utf-8><title>nanokv x-ray</title><style>{style}</style><body>{head}{''.join(spans)}</body>\n"
