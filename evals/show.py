"""Format results as tables for a terminal. Each function formats the records of one part of bench.py."""

from __future__ import annotations

from collections.abc import Sequence

from evals.quality import PROTOCOLS, mean
from nanokv.cache.report import mib


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table. The first column is aligned left, the others right."""
    lines = [head, *rows]
    width = [max(len(r[i]) for r in lines) for i in range(len(head))]
    cells = [[x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(r, width, strict=True))] for r in lines]
    return "\n".join("  ".join(r).rstrip() for r in cells)


def quality(parts: Sequence[dict]) -> str:
    """Format one table per length: a row per plan, a column per task with aware / agnostic / turn 2 in percent."""
    out = []
    for length in sorted({p["length"] for p in parts}):
        selected = [p for p in parts if p["length"] == length]
        good = [p for p in selected if "refused" not in p]
        out.append(
            f"{length} tokens, {selected[0]['texts']} texts a task: aware / agnostic / turn 2 (after aware), % solved"
        )
        rows = []
        for name in selected[0]["plans"] if not good else good[0]["plans"]:
            cells = [_cell(p["plans"].get(name)) for p in selected]
            rows.append([name, *cells, *_size([p["plans"][name]["aware"] for p in selected if name in p["plans"]])])
        out.append(table(["plan", *(p["task"] for p in selected), "cache", "less by"], rows))
        out += [f"! {p['refused']}" for p in selected if "refused" in p] + [""]
    return "\n".join(out)


def taken(parts: Sequence[dict]) -> list[str]:
    """Say which plans auto took, and how often. A line per task and protocol."""
    return [
        f"{name} took for {part['task']} at {part['length']} tokens, {protocol}: "
        + ", ".join(f"{text} ({n})" for text, n in found["took"].items())
        for part in parts
        for name, plan in part["plans"].items()
        for protocol, found in plan.items()
        if "took" in found
    ]


def _cell(plan: dict | None) -> str:
    """Format the three scores of a plan on one task."""
    if plan is None or "refused" in plan["aware"]:
        return "-"
    return " ".join(
        f"{100 * s:3.0f}" for s in (plan["aware"]["score"], plan["agnostic"]["score"], plan["aware"]["turn2"])
    )


def _size(found: Sequence[dict]) -> list[str]:
    """Format the mean bytes and the ratio to the full cache."""
    found = [f for f in found if "bytes" in f]
    if not found:
        return ["-", "-"]
    size = mean([f["bytes"] for f in found])
    return [mib(int(size)), f"{mean([f['full_bytes'] for f in found]) / size:.1f}x"]


def averages(parts: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Return every plan's means over the tasks of one length where full reached its floor.

    The keys are aware, agnostic, turn2, bytes and ratio (bytes of the full cache / bytes).
    """
    good = [p["plans"] for p in parts if "refused" not in p]
    out = {}
    for name in good[0] if good else ():
        selected = [p[name] for p in good]
        if any("refused" in p["aware"] for p in selected):
            continue
        size, full = (mean([p["aware"][k] for p in selected]) for k in ("bytes", "full_bytes"))
        scores = {q: mean([p[q]["score"] for p in selected]) for q in PROTOCOLS}
        out[name] = scores | {
            "turn2": mean([p["aware"]["turn2"] for p in selected]),
            "bytes": size,
            "ratio": full / size,
        }
    return out


def percent(x: float | None) -> str:
    """Format a share as a percentage, None as -."""
    return "-" if x is None else f"{x:.0%}"


def fidelity(found: Sequence[dict]) -> str:
    """Format the rows that `quality.merged` returns."""
    rows = []
    for f in found:
        if "refused" in f:
            rows.append([f["plan"], str(f["length"]), *"-----", f["refused"][:60]])
            continue
        first = f"{f['first']:.0f} ({f['departed']} of {f['texts']})" if f["departed"] else f"never in {f['texts']}"
        cells = [f"{f['kl_mean']:.4f}", f"{f['kl_p99']:.3f}", f"{f['top1']:.1%}", f"{f['ppl']:.2f}"]
        rows.append([f["plan"], str(f["length"]), *cells, f"{f['ppl'] / f['ppl_full'] - 1:+.1%}", first])
    return table(
        ["plan", "tokens", "KL mean", "KL 99 %", "same top", "perplexity", "to full", "greedy departs after"], rows
    )


def speed(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        head = [r["plan"], str(r["length"]), str(r["batch"])]
        if "refused" in r:
            rows.append([*head, "-", "-", "-", "-", "-"])
            continue
        size = [mib(r["bytes"]), f"{r['full_bytes'] / r['bytes']:.1f}x"]
        rows.append([*head, f"{r['prefill_s']:.2f}", f"{r['decode_tok_s']:.1f}", f"{r['bus']:.0%}", *size])
    return table(["plan", "tokens", "batch", "prefill s", "decode tok/s", "of the bus", "cache", "less by"], rows)


def compiled(found: Sequence[dict], lengths: Sequence[int]) -> str:
    rows = []
    for r in found:
        head = [r["plan"], r.get("mode", "-")]
        if "refused" in r:
            rows.append([*head, *["-"] * 8])
            continue
        gain = (r["eager_ms"] - r["compiled_ms"]) / 1e3  # seconds a token
        pays = " / ".join(f"{r[s] / gain:,.0f}" if gain > 0 else "never" for s in ("cold_s", "warm_s"))
        graphs = [str(r["graphs"]), f"+{r['graphs_second_length']}", "dynamic" if r["dynamic"] else "static"]
        seconds = [f"{r['cold_s']:.1f}", f"{r['warm_s']:.1f}"]
        step = [f"{r['eager_ms']:.1f} → {r['compiled_ms']:.1f}", f"{r['ratio']:.2f}x"]
        rows.append([*head, *graphs, *seconds, *step, pays])
    head = [
        "plan",
        "mode",
        f"graphs at {lengths[0]}",
        f"at {lengths[1]}",
        "shapes",
        "cold s",
        "warm s",
        "step ms",
        "faster",
        "pays after tokens, cold / warm",
    ]
    return table(head, rows)


def memory(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        head = [r["plan"], str(r["length"]), str(r["batch"])]
        if "refused" in r:
            rows.append([*head, "-", "-", "-", r["refused"][:60]])
            continue
        less = f"{r['full_bytes'] / r['bytes']:.1f}x"
        rows.append([*head, mib(r["bytes"]), mib(r["full_bytes"]), less, mib(r["peak_bytes"])])
    return table(["plan", "tokens", "batch", "cache (receipt)", "dense", "less by", "peak of the process"], rows)


def kernels(found: Sequence[dict], limit: float) -> str:
    rows = []
    for r in found:
        head = [r["name"], str(r["kv_heads"]), str(r["group"]), str(r["batch"]), str(r["slots"]), mib(r["bytes"])]
        if "absent" in r:
            rows.append([*head, "-", "-", "-", r["absent"]])
            continue
        best = f"{r['of_best']:.2f}x" if "of_best" in r else "-"
        spread = f"{r['p10'] * 1e6:.0f}–{r['p90'] * 1e6:.0f}"
        rows.append(
            [*head, f"{r['seconds'] * 1e6:.1f} ({spread})", percent(r["bytes"] / r["seconds"] / limit), best, ""]
        )
    return table(["", "KV heads", "group", "rows", "slots", "must read", "µs", "of copy", "to torch's best", ""], rows)


def steps(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        head = [r["model"], str(r["batch"]), str(r["slots"]), r["plan"]]
        if "absent" in r:
            rows.append([*head, "-", "-", "-", "-", r["absent"]])
            continue
        cells = [
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['tok_s']:.0f}",
            percent(r["of_roof"]),
            f"{r['speedup']:.2f}x",
            f"of {r['cap']:.2f}x",
        ]
        rows.append([*head, *cells])
    return table(["model", "rows", "slots", "plan", "ms", "tokens/s", "of the roof", "to full", "bytes allow"], rows)


def peers_speed(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        if "absent" in r:
            rows.append([r["name"], str(r["length"]), *"-" * 6, r["absent"]])
            continue
        note = f"compiled in {r['compile_s']:.0f} s" if r["compile_s"] else ""
        size = mib(r["bytes"]) if "bytes" in r else "-"
        ratio = f"{r['ratio']:.2f}x" if "ratio" in r else "-"
        read = f"{r['read_s'] / 1e9:.1f}" if "read_s" in r else "-"
        pre = r["length"] / r["prefill_s"]
        rows.append(
            [
                r["name"],
                str(r["length"]),
                f"{r['prefill_s']:.2f}",
                f"{pre:.0f}",
                f"{r['decode_tok_s']:.1f}",
                ratio,
                size,
                read,
                note,
            ]
        )
    head = ["", "tokens", "prefill s", "tok/s", "decode tok/s", "to nanokv full", "cache", "GB/s", ""]
    return table(head, rows)


def peers_quality(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        name = f"{r['task']}: {r['name']}" if "task" in r else r["name"]
        if "absent" in r:
            rows.append([name, *"------", r["absent"]])
            continue
        cells = []
        for protocol in PROTOCOLS:
            cells += [percent(r.get(f"{who}_{protocol}")) for who in ("ours", "theirs")]
        cells += [mib(int(r[f"{who}_bytes"])) if f"{who}_bytes" in r else "-" for who in ("ours", "theirs")]
        rows.append([name, *cells, r["differs"]])
    head = [
        "task: method",
        "aware: nanokv",
        "kvpress",
        "agnostic: nanokv",
        "kvpress",
        "cache: nanokv",
        "kvpress",
        "what differs",
    ]
    return table(head, rows)


def drafts(found: Sequence[dict]) -> str:
    """Speculative decoding, a row per draft and kind of text."""
    rows = [
        [
            r["draft"],
            r["kind"],
            f"{r['same']} of {r['texts']}",
            percent(r["accepted"] / max(1, r["drafted"])),
            f"{1 + r['accepted'] / r['passes']:.2f}",
            f"{r['plain_tok_s']:.1f}",
            f"{r['tok_s']:.1f}",
            f"{r['tok_s'] / r['plain_tok_s']:.2f}x",
        ]
        for r in found
    ]
    head = ["draft", "text", "same tokens", "accepted", "tokens a pass", "tok/s without", "with", "gain"]
    return table(head, rows)


def endless(found: Sequence[dict]) -> str:
    """Format one row per plan: speed and bytes near the start and at the end."""
    rows = [
        [
            f["plan"],
            str(f["new_tokens"]),
            f"{f['early_tok_s']:.1f}",
            f"{f['late_tok_s']:.1f}",
            f"{f['late_tok_s'] / f['early_tok_s'] - 1:+.1%}",
            mib(f["bytes"][0]),
            mib(f["bytes"][-1]),
            str(max(f["held"])),
        ]
        for f in found
    ]
    head = ["plan", "tokens", "tok/s early", "late", "change", "cache early", "late", "most held"]
    return table(head, rows)


def codes(found: Sequence[dict]) -> str:
    cells = [
        [
            f["plan"],
            *(f"{f[f'{x}_bits']:.2f}" for x in "kv"),
            *(f"{f[f'{x}_{y}']:.5f}" for x in "kv" for y in ("mse", "worst")),
        ]
        for f in found
    ]
    return table(["plan", "K bits", "V bits", "K error", "worst layer", "V error", "worst layer"], cells)


def prose(found: Sequence[dict]) -> str:
    """Format perplexities, and their change against the first row of the same length."""
    rows = [
        [
            f["plan"],
            str(f["tokens"]),
            f"{f['ppl']:.2f}",
            f"{f['ppl'] / next(x['ppl'] for x in found if x['tokens'] == f['tokens']) - 1:+.1%}",
            mib(f["bytes"]) if "bytes" in f else "-",
        ]
        for f in found
    ]
    return table(["plan", "tokens", "perplexity", "against the first", "cache at the end"], rows)


def auto(found: Sequence[dict]) -> str:
    """same top: % of tokens where the most likely one is full's. auto itself judges by KL, in nats."""
    rows = []
    for r in found:
        best = max(x["same"] for name, x in r["plans"].items() if name != "auto")
        for name, x in r["plans"].items():
            notes = []
            if name == "auto":
                notes = [f"took {k} {r['taken'].count(k)}x" for k in dict.fromkeys(r["taken"])]
                notes.append(f"the trial: {r['prefills']:.1f} prefills")
            cells = [percent(x["same"]), f"{100 * (x['same'] - best):+.1f}", f"{x['kl']:.3f}", mib(int(x["bytes"]))]
            rows.append([r["kind"], str(r["length"]), r["budget"], name, *cells, "; ".join(notes)])
    return table(["text", "tokens", "budget", "plan", "same top", "points to the best", "KL", "cache", ""], rows)
