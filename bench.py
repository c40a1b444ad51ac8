"""Quality, speed and bytes of KV-cache policies: `python bench.py` alone takes some minutes and prints one table.

quality   tasks under both protocols, a second turn, fidelity to the full cache       speed    prefill, decode, share of the memory bus
memory    receipt and peak, one process a row       peers    transformers, kvpress, llama.cpp on the same prompts       all    all of them

The last line on stdout is the result as one JSON document; --json writes it to a file, with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from evals import record, show
from evals.tasks import TASKS
from weights.registry import DEFAULT, settings

TUNED = ("snapkv:window=8,kernel=13", "simlayer:recent=256")  # what suits prompts of 1,000 tokens of single digits


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.error = lambda message: sys.exit(complain(message))
    a = p.add_argument
    a("what", nargs="?", default="quick", choices=("quick", "quality", "speed", "memory", "peers", "all"))
    a("--model", default=DEFAULT, metavar="M")
    a("--device", default="auto", metavar="D")
    a("--dtype", default="auto", metavar="T")
    a(
        "--plans",
        nargs="+",
        metavar="PLAN",
        help="these beside full, random and streaming, instead of every registered one",
    )
    a("--budgets", nargs="+", metavar="B", help="for plans that name none: 512, 25%%, 64MiB")
    a("--lengths", nargs="+", type=int, metavar="N", help="tokens of prompt")
    a("--batches", nargs="+", type=int, default=[1], metavar="B", help="rows, for speed")
    a("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    a("--seeds", type=int, metavar="N", help="texts of each task and length")
    a("--floor", type=float, metavar="F", help="what full must solve, 0 … 1, before other scores are shown")
    a("--full", action="store_true", help="quality: more lengths, budgets and texts; goes on where it was broken off")
    a("--gguf", metavar="FILE", help="peers: the same model for llama-bench")
    a("--llama-bench", default="llama-bench", metavar="PATH")
    a("--json", metavar="FILE", help="the result, also as a file")
    a("--plot", metavar="DIR", help="pictures of it, PNG")
    a("--quiet", action="store_true", help="no progress bars")
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args, argv)
    except ValueError as e:
        if settings().debug:
            raise
        return complain(str(e))
    except KeyboardInterrupt:
        print("interrupted" + ("; the same command goes on from here" if args.full else ""), file=sys.stderr)
        return 130


def complain(message: str) -> int:
    print(f"bench.py: {' '.join(message.split())}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    check(args)
    plans_of(args, ())  # a plan or budget with a mistake is told before a model is loaded
    from nanokv import load

    bar = sys.stderr.isatty() and not args.quiet
    llm = load(args.model, device=args.device, dtype=args.dtype, bar=bar)
    packages = ["torch", "triton"] + ["transformers", "kvpress"] * (args.what in ("peers", "all"))
    result = {"what": args.what, **record.facts(llm, ["bench.py", *argv], packages)}
    print(f"{llm.name} · {result['machine']} · {llm.dtypes['prefill']}/{llm.dtypes['decode']}", file=sys.stderr)
    t0 = time.perf_counter()
    parts = {"quick": quick, "quality": quality, "speed": speed, "memory": memory, "peers": peers}
    for name in ("quality", "speed", "memory", "peers") if args.what == "all" else (args.what,):
        result |= parts[name](args, llm, Bar(bar))
    result["seconds"] = round(time.perf_counter() - t0, 1)
    if args.plot:
        from evals.plots import draw

        for file in draw(result, Path(args.plot)):
            print(f"wrote {file}", file=sys.stderr)
    if args.json:
        write(args.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def check(args: argparse.Namespace) -> None:
    for flag in ("lengths", "batches", "seeds"):
        value = getattr(args, flag)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{flag} is {value}; give numbers of at least 1")
    if args.full and args.what not in ("quality", "all"):
        raise ValueError(f"--full is of quality, not of {args.what}; leave it out, or give `bench.py quality --full`")
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no directory {Path(args.json).parent}; make it first")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("--plot needs matplotlib; pip install matplotlib, or leave --plot out") from None


def write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ValueError(f"--json {file} cannot be written ({e.strerror}); the result is on standard output") from None


class Bar:
    """Progress on a terminal, nothing elsewhere."""

    def __init__(self, on: bool):
        self.on = on

    def __call__(self, things: Sequence, name: str) -> tqdm:
        return tqdm(things, desc=name, leave=False, disable=not self.on)


def plans_of(args: argparse.Namespace, budgets: Sequence[str]) -> dict:
    """Name → plan: the registered ones, or the asked ones with full, random and streaming; full always first."""
    from evals.quality import named, registered

    texts = [*registered(), *TUNED] if args.plans is None else ["full", "random", "streaming", *args.plans]
    return named(texts, args.budgets or budgets)


# ---- the parts: each prints its tables and returns its share of the result -------------------------------------------


def quality(args: argparse.Namespace, llm, bar: Bar) -> dict:
    from evals.quality import Item

    plans = plans_of(args, ("50%", "25%", "10%") if args.full else ("25%",))
    tasks = args.tasks or list(TASKS)
    lengths, seeds = args.lengths or ([1000, 2000] if args.full else [1000]), args.seeds or (20 if args.full else 5)
    items = [Item(t, n, s) for n in lengths for t in tasks for s in range(seeds)]
    if args.full and args.lengths is None and "needle" in tasks:  # the rest of the grid
        items += [Item("needle", n, s) for n in (500, 3000) for s in range(seeds)]
    texts = [(n, seed) for n in lengths for seed in range(3 if args.full else 1)]
    return judge(args, llm, bar, plans, items, texts, 64 if args.full else 32)


def judge(
    args: argparse.Namespace, llm, bar: Bar, plans: dict, items: list, texts: list, n: int, quiet: bool = False
) -> dict:
    """Tasks and fidelity of all plans; n: tokens of text on which fidelity is taken."""
    from evals import quality as q

    names, chosen = list(plans), list(plans.values())
    journal = None
    if args.full:
        file = Path((args.json or "quality.json") + ".part")
        journal = record.Journal(
            file, {"model": llm.name, "dtype": llm.dtypes, "plans": [str(p) for p in chosen], "n": n}
        )
    done = {} if journal is None else journal.done

    def keep(key: str, work: Callable[[], list[dict]]) -> list[dict]:
        if key not in done:
            found = work()
            if journal is None:
                return found
            journal.keep(key, found)
        return done[key]

    if args.full:
        estimate(llm, chosen, items, texts, n, done)
    tests = {i: keep(str(i), lambda i=i: q.judge(llm, chosen, i)) for i in bar(items, "tasks")}
    held = [
        {**f, "length": length}
        for length, seed in bar(texts, "fidelity")
        for f in keep(f"fidelity {length} {seed}", lambda a=length, s=seed: q.fidelity(llm, chosen, s, a, n))
    ]
    summary = q.summary(llm.name, names, tests, args.floor)
    if not quiet:
        print(show.quality(summary))
        print(f"the {n} tokens after a text, and the {n} that full's greedy writes:\n{show.fidelity(names, held)}\n")
    result = {
        "plans": {k: str(p) for k, p in plans.items()},
        "quality": summary,
        "grid": q.grid(names, tests),
        "fidelity": held,
    }
    if journal is not None:
        if args.json:
            write(args.json, json.dumps(result) + "\n")  # before the journal goes
        journal.file.unlink()
    return result


def estimate(llm, plans: list, items: list, texts: list, n: int, done: dict) -> None:
    """Say what is to do and how long it will take, by two texts of different length."""
    from evals import quality as q

    left = [i for i in items if str(i) not in done]
    reads = [t for t in texts if f"fidelity {t[0]} {t[1]}" not in done]
    q.judge(llm, plans[:1], q.Item("needle", 64, 0))
    cost = {}
    for length in (256, 1024):
        t0 = time.perf_counter()
        q.judge(llm, plans, q.Item("needle", length, 1))
        cost[length] = time.perf_counter() - t0
    slope = max(0.0, cost[1024] - cost[256]) / 768
    seconds = sum(cost[256] + slope * (i.length - 256) for i in left) * 1.1  # other tasks have more to answer
    seconds += len(reads) * len(plans) * 2 * n * 0.04
    print(
        f"plan: {len(plans)} plans × {len(items)} texts under both protocols, fidelity on {len(texts)} texts; "
        f"{len(items) - len(left) + len(texts) - len(reads)} of these are done already; about {seconds / 60:.0f} minutes to go",
        file=sys.stderr,
    )


def speed(args: argparse.Namespace, llm, bar: Bar) -> dict:
    from evals import speed as s

    plans, limit = plans_of(args, ("25%",)), s.ceiling(llm.device)
    print(f"memory bus: this process reads {limit / 1e9:.1f} GB/s; a step reads weights and cache once")
    sizes = [(n, b) for n in args.lengths or [512, 2048, 4096] for b in args.batches]
    found = [r for n, b in bar(sizes, "speed") for r in s.speed(llm, list(plans.values()), n, b, limit)]
    print(show.speed(list(plans), found) + "\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "ceiling": limit, "speed": found}


def memory(args: argparse.Namespace, llm, bar: Bar) -> dict:
    from evals import speed as s

    plans = plans_of(args, ("25%",))
    flags = ["--device", args.device, "--dtype", args.dtype]
    texts, found = [str(p) for p in plans.values()], []
    for n in bar(args.lengths or [512, 4096], "memory"):
        found += s.memory(llm, args.model, texts, [n], flags)
    print(show.memory(list(plans), found) + "\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "memory": found}


def peers(args: argparse.Namespace, llm, bar: Bar) -> dict:
    import torch

    from evals import peers as p

    kept = float((args.budgets or ["25%"])[0].rstrip("%")) / 100
    found = []
    for n in bar(args.lengths or [512, 4096], "peers: speed"):
        found += p.speed(llm, args.model, n, kept)
        found.append(p.llama_bench(n, args.llama_bench, args.gguf, torch.get_num_threads()))
    print(f"decode in turns, {kept:.0%} kept by policies\n{show.peers_speed(found)}\n")
    tasks, seeds = args.tasks or ["needle", "multikey"], args.seeds or 20
    with bar(range(len(tasks) * seeds), "peers: quality") as progress:
        scores = p.quality(llm, args.model, tasks, 1000, seeds, 0.5, progress.update)
    print(f"the same {seeds} texts of 1000 tokens, 50% kept\n{show.peers_quality(scores)}\n")
    return {"peers_speed": found, "peers_quality": scores}


def quick(args: argparse.Namespace, llm, bar: Bar) -> dict:
    """Everything small, in one table."""
    from evals import speed as s
    from evals.quality import Item

    plans = plans_of(args, ("25%",))
    seeds, length = args.seeds or 5, (args.lengths or [1000])[0]
    items = [Item(t, length, seed) for t in args.tasks or TASKS for seed in range(seeds)]
    result = judge(args, llm, bar, plans, items, [(length, 0)], 32, quiet=True)
    limit, long = s.ceiling(llm.device), 4 * length
    times = s.speed(llm, list(plans.values()), long, 1, limit)
    rows = []
    for i, name in enumerate(plans):
        scores = show.averages(result["quality"], name) if name in result["quality"][0]["plans"] else {}
        near, t = result["fidelity"][i], times[i]
        cells = ["-" if x is None else f"{x:.0%}" for x in scores.values()] or ["-"] * 3
        cells += [f"{near['kl_mean']:.3f}", f"{near['top1']:.0%}"]
        if "refused" in t:
            cells += ["-"] * 5
        else:
            from nanokv.cache import mib

            cells += [f"{t['prefill_s']:.1f}", f"{t['decode_tok_s']:.1f}", f"{t['bus']:.0%}", mib(t["bytes"])]
            cells.append(f"{t['full_bytes'] / t['bytes']:.1f}x")
        rows.append([name, *cells])
    head = [
        "plan",
        "aware",
        "agnostic",
        "turn 2",
        "KL",
        "same top",
        "prefill s",
        "tok/s",
        "of the bus",
        "cache",
        "less by",
    ]
    print(show.table(head, rows))
    refused = [p["refused"] for p in result["quality"] if "refused" in p]
    print("\n".join(f"! {r}" for r in refused) or "no task was refused: full reached its floor in all")
    print(
        f"\naware, agnostic, turn 2: % solved of {len(args.tasks or TASKS)} tasks × {seeds} texts of {length} tokens\n"
        f"KL in nats, same top token: against full, on 32 tokens of text\n"
        f"seconds and bytes at {long} tokens; bus: of the {limit / 1e9:.1f} GB/s that this process reads"
    )
    return result | {"ceiling": limit, "speed": times}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
