"""What was kept, drawn: a line per layer over the text's positions. Reads stores only through `unpack`."""

from __future__ import annotations

from nanokv.engine import Session

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
            kept = cache.stores[owner].unpack()[row]
            counts = kept.length[0].tolist()
            held = [0] * -(-seen // cell)
            for pos, n in zip(kept.pos[0].tolist(), counts, strict=True):
                for p in pos[:n]:
                    held[p // cell] += 1
            strip = "".join(_shade(h, len(counts) * min(cell, seen - i * cell)) for i, h in enumerate(held))
            span = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"
            lazy = f"  score {cache.scores[owner][row]:.2f}" if cache.scores[owner][row] else ""
            lines.append(f"layer {layer:3}  {span:>9}  |{strip}|{lazy}")
    return "\n".join(lines)


def _shade(held: int, of: int) -> str:
    return SHADES[-(-held * (len(SHADES) - 1) // of)]
