"""Draw pictures of a result of bench.py. They are readable without colour.

python -m evals.plots results/quality.json results      draws a saved result
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from evals.show import averages

MARKERS = "os^Dv*PX<>dhp8H"
LINES = ("-", "--", ":", "-.")
GREYS = ("0.0", "0.35", "0.55", "0.2", "0.45")


def draw(result: dict, folder: Path) -> Iterator[Path]:
    """Draw one PNG for each picture that the result has figures for, and yield its path."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"quality": pareto, "grid": needles, "speed": tokens_per_second}
    for key, picture in pictures.items():
        if result.get(key):
            yield from picture(result, folder)
    if result.get("speed"):
        yield from stacked(result, folder)


def method(name: str) -> str:
    """Return a plan's name without its budget."""
    head, _, last = name.rpartition(" ")
    name = re.sub(r"budget=[^,+]*,?", "", head if head and last[:1].isdigit() else name)
    return re.sub(r"[:,](?=\+|$)", "", name)


def pareto(result: dict, folder: Path) -> Iterator[Path]:
    """Plot score against bytes. Up and left is better; a broad grey line is the best score within so many bytes."""
    from matplotlib import pyplot as plt

    for length in sorted({p["length"] for p in result["quality"]}):
        parts = [p for p in result["quality"] if p["length"] == length and "refused" not in p]
        if not parts or {p["task"] for p in parts} == {"needle"}:
            continue  # a length that only the needle grid uses
        fig, panels = plt.subplots(1, 3, figsize=(9.5, 3.8), sharey=True)
        lines: dict[str, list[tuple]] = {}
        for name, point in averages(parts).items():
            lines.setdefault(method(name), []).append((point["bytes"] / 2**20, point))
        for panel, key, title in zip(
            panels,
            ("aware", "agnostic", "turn2"),
            ("question known", "question comes later", "second question"),
            strict=True,
        ):
            for i, (name, points) in enumerate(lines.items()):
                shown = sorted((x, y[key]) for x, y in points if y[key] is not None)
                full = name == "full"
                panel.plot(
                    [x for x, _ in shown],
                    [100 * y for _, y in shown],
                    marker=MARKERS[i % len(MARKERS)],
                    linestyle=LINES[i % len(LINES)],
                    color=GREYS[i % len(GREYS)],
                    markerfacecolor="white" if i % 2 else GREYS[i % len(GREYS)],
                    label=name,
                    linewidth=1.2,
                )
                if full and shown:
                    panel.axhline(100 * shown[0][1], color="0.8", linewidth=0.8, zorder=0)
            points = sorted((x, y[key]) for line in lines.values() for x, y in line if y[key] is not None)
            best = [100 * y for y in accumulate((y for _, y in points), max)]
            panel.step([x for x, _ in points], best, where="post", color="0.85", linewidth=5, zorder=0)
            panel.set(title=title, xlabel="cache, MiB", ylim=(-3, 103))
            panel.set_xlim(left=0)
        panels[0].set_ylabel(f"% solved, mean of {len(parts)} tasks")
        handles, labels = panels[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
        fig.suptitle(f"{result['model']}, {length} tokens", x=0.01, ha="left")
        rows = -(-len(labels) // 4)
        fig.tight_layout(rect=(0, 0.03 + 0.055 * rows, 1, 1))
        yield _save(fig, folder / f"pareto-{length}.png")


def needles(result: dict, folder: Path) -> Iterator[Path]:
    """Draw needle scores by length and depth. Each method has one map, at its middle budget."""
    from matplotlib import pyplot as plt

    plans: dict[str, list[str]] = {}
    for name in result["grid"]:
        plans.setdefault(method(name), []).append(name)
    chosen = [names[len(names) // 2] for names in plans.values()]
    fig, panels = plt.subplots(
        2, len(chosen), figsize=(1.75 * len(chosen) + 0.8, 4.6), squeeze=False, sharex=True, sharey=True
    )
    for column, name in enumerate(chosen):
        for panel, protocol in zip(panels[:, column], ("aware", "agnostic"), strict=True):
            cells = result["grid"][name][protocol]
            lengths, depths = sorted({c[0] for c in cells}), sorted({c[1] for c in cells})
            score = {(length, depth): s for length, depth, s in cells}
            grid = [[score[n, d] for n in lengths] for d in depths]
            panel.imshow(grid, cmap="Greys_r", vmin=0, vmax=1, aspect="auto")
            for y, row in enumerate(grid):
                for x, s in enumerate(row):
                    panel.text(
                        x,
                        y,
                        f"{100 * s:.0f}",
                        ha="center",
                        va="center",
                        color="black" if s > 0.5 else "white",
                        fontsize=7,
                    )
            panel.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=60)
            panel.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
            panel.spines[:].set_visible(True)
        panels[0, column].set_title(name.replace(":", ":\n").replace(",", ",\n"), fontsize=8)
    for row, text in enumerate(("question known", "question comes later")):
        panels[row, 0].set_ylabel(f"{text}\ndepth in the text")
    fig.supxlabel("tokens of text; figures: % of needles found", fontsize=9)
    fig.tight_layout()
    yield _save(fig, folder / "needles.png")


def tokens_per_second(result: dict, folder: Path) -> Iterator[Path]:
    """Plot decode speed against context length. A policy with a fixed budget gives a flat line."""
    from matplotlib import pyplot as plt

    for batch in sorted({r["batch"] for r in result["speed"]}):
        rows = [r for r in result["speed"] if r["batch"] == batch and "refused" not in r]
        lengths = sorted({r["length"] for r in rows})
        if len(lengths) < 2:
            continue
        fig, panel = plt.subplots(figsize=(6.4, 4))
        for i, name in enumerate(dict.fromkeys(r["plan"] for r in rows)):
            points = sorted((r["length"], r["decode_tok_s"]) for r in rows if r["plan"] == name)
            panel.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=LINES[i % len(LINES)],
                color=GREYS[i % len(GREYS)],
                markerfacecolor="white" if i % 2 else GREYS[i % len(GREYS)],
                label=name,
                linewidth=1.8 if i == 0 else 1.1,
            )
        panel.set(xlabel="tokens of context", ylabel=f"decode, tokens/s, batch {batch}", xscale="log")
        panel.set_xticks(lengths, [str(n) for n in lengths])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
        panel.set_title(f"{result['model']}, {result['machine']}", loc="left", fontsize=8)
        fig.tight_layout()
        yield _save(fig, folder / (f"speed-batch{batch}.png" if batch > 1 else "speed.png"))


def stacked(result: dict, folder: Path) -> Iterator[Path]:
    """Draw the cache's bytes by their use, at the longest context."""
    from matplotlib import pyplot as plt

    longest = max(r["length"] for r in result["speed"])
    rows = [r for r in result["speed"] if r["length"] == longest and r["batch"] == 1 and "refused" not in r]
    if not rows:
        return
    kinds = [*rows[0]["kinds"], "host"]
    fig, panel = plt.subplots(figsize=(6.6, 0.45 * len(rows) + 1.4))
    left = [0.0] * len(rows)
    for i, kind in enumerate(kinds):
        sizes = [(r["host"] if kind == "host" else r["kinds"][kind]) / 2**20 for r in rows]
        if sum(sizes):
            shade, hatch = ("0.25", "0.6", "0.8", "1.0", "0.95")[i], ("", "", "", "////", "....")[i]
            panel.barh(
                range(len(rows)), sizes, left=left, color=shade, hatch=hatch, edgecolor="0.2", linewidth=0.5, label=kind
            )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for y, (r, x) in enumerate(zip(rows, left, strict=True)):
        panel.text(x, y, f" {r['full_bytes'] / r['bytes']:.1f}x", va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [r["plan"] for r in rows])
    panel.invert_yaxis()
    panel.set(xlabel=f"MiB after {longest} tokens")
    panel.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    fig.tight_layout()
    yield _save(fig, folder / "bytes.png")


def _save(fig, file: Path) -> Path:
    from matplotlib import pyplot as plt

    fig.savefig(file, metadata={"Software": None})
    plt.close(fig)
    return file


if __name__ == "__main__":
    for made in draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])):
        print(made)
