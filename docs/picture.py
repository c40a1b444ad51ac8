"""Draw docs/picture.svg: a model asks its cache to attend, and a plan says what the cache does. `python -m docs.picture`.

All text stands in boxes with a light fill and a dark line, so the picture can be read on light and on dark backgrounds.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FILE = Path(__file__).parent / "picture.svg"
BLUE, GREEN, YELLOW, RED = "#dbe9fb", "#dcf2df", "#fdf1cc", "#fbe0dc"


def box(x: int, y: int, width: int, height: int, fill: str, title: str, *lines: str) -> str:
    """A rounded box with a bold title and lines of text below it."""
    middle = x + width // 2
    first = y + height // 2 - 9 * len(lines) + 5
    text = f'<text x="{middle}" y="{first}" font-weight="bold">{escape(title)}</text>'
    for i, line in enumerate(lines):
        text += f'<text x="{middle}" y="{first + 18 * (i + 1)}" font-size="12.5">{escape(line)}</text>'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="#555"/>{text}'


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#888" stroke-width="2" marker-end="url(#head)"/>'


def picture() -> str:
    parts = [
        box(10, 20, 190, 90, BLUE, "model", "Llama, Mistral, Qwen2", "computes q, k, v"),
        box(285, 20, 150, 90, YELLOW, "attend", "q, k, v, positions", "→ attention output"),
        box(520, 20, 230, 90, GREEN, "cache", "prefill: compresses layer by layer", "decode: fixed slots, in place"),
        arrow(200, 65, 280, 65),
        arrow(435, 65, 515, 65),
        box(10, 175, 235, 92, RED, "keep", "a policy: which tokens stay", "snapkv · h2o · simlayer …"),
        box(262, 175, 235, 92, RED, "store", "how they lie in memory", "dense · int4 · shadow · offload …"),
        box(515, 175, 235, 92, RED, "share", "which layers own storage", "kvsharer"),
        arrow(127, 175, 560, 114),
        arrow(380, 175, 610, 114),
        arrow(632, 175, 645, 114),
    ]
    head = '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path d="M0 0L10 5L0 10z" fill="#888"/></marker>'
    style = 'font-family="system-ui,Helvetica,Arial,sans-serif" font-size="15" text-anchor="middle" fill="#222"'
    title = "<title>A model asks its cache to attend; keep, store and share say what the cache does</title>"
    body = "\n".join(parts)
    size = 'viewBox="0 0 760 285" width="760" height="285"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{title}<defs>{head}</defs>\n{body}\n</svg>\n'


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
