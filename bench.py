"""Quality, speed and bytes of KV-cache policies: `python bench.py` alone takes some minutes and prints one table.

quality   tasks under both protocols, a second turn, fidelity to the full cache       speed    prefill, decode, share
of the memory bus
compile    of each plan: graphs, seconds of compiling cold and warm, the time of a step in plain calls and compiled
memory    receipt and peak, one process a row       peers    transformers, kvpress, llama.cpp on the same prompts
all    these four
kvpress   its scores and ours at equal settings, without the speeds that peers takes too
kernels   on a GPU: each kernel and whole decode steps against what the device can do
codes     what each store's rounding does to the keys and values of a text
drafts    speculative decoding: whether the text stays the same, how often a draft is right, tokens/s
auto      `--policy auto` beside each of the plans that it tries, on three kinds of text
endless   20,000 generated tokens: speed and bytes at both ends       prose    perplexity of a text, far beyond the
context if you like

The last line on stdout is the result as one JSON document; --json writes it to a file, with machine, versions and
commit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from evals import record, show
from evals.quality import Auto, Item, named, registered
from evals.tasks import STANDARD, TASKS
from nanokv import cli, streams
from nanokv.cache.plan import Plan, parse
from nanokv.compiled import MODES
from nanokv.files import check_outputs, write_text
from nanokv.llm import LLM, load
from nanokv.runner import RUNNERS
from weights.registry import DEFAULT

PROGRAM = "bench.py"

# chosen on these very tasks: pooling as wide as a code of single digits, and a window that leaves something to drop
# at 1,000 tokens
TUNED = ("snapkv:window=8,kernel=13", "simlayer:recent=256")
# the bare run's: one of each kind, so that it stays a matter of minutes
QUICK = ("full", "random", "streaming", *TUNED, "adakv:window=8,kernel=13", "keydiff", "tova")


PARTS = (
    "quick",
    "quality",
    "codes",
    "speed",
    "compile",
    "kernels",
    "memory",
    "peers",
    "kvpress",
    "drafts",
    "endless",
    "prose",
    "auto",
)
# beside the registered stores, other settings of theirs
CODES = ("full+fp8:format=e5m2", "full+turbo:k=3,v=3", "full+turbo:k=2,v=2")
DRAFTED = 4  # tokens of a draft, at most, as generate.py's default
# what holds a budget of 512 over any length, and the ways to read a long text
ENDLESS = ("streaming:budget=512", "h2o:budget=512", "tova:budget=512", "snapkv:budget=512,every=128")
COMPILED = ("full", "snapkv", "h2o", "adakv", "full+int4", "full+fp8", "kvsharer:layers=4")
PROSE = tuple(f"streaming:positions=cache,sink={sink},recent={recent}" for sink, recent in ((4, 1020), (0, 1024)))


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    a = p.add_argument
    a("what", nargs="?", default="quick", choices=(*PARTS, "all"))
    a("--model", default=DEFAULT, metavar="M")
    a("--device", default="auto", metavar="D")
    a("--dtype", default="auto", metavar="T")
    a("--random-weights", action="store_true", help="the named shape with random weights: for speed and memory")
    a("--runner", default="auto", choices=("auto", *RUNNERS), help="of decode steps; peers measures eager and compile")
    a(
        "--plans",
        nargs="+",
        metavar="PLAN",
        help="these beside full, random and streaming, instead of every registered one; of compile, endless and prose: "
        "these alone; of drafts: lookup, or the plans that write them; "
        "of peers: full and these, beside the others' full cache, and speed alone; of kvpress: these of its methods",
    )
    a("--budgets", nargs="+", metavar="B", help="for plans that name none: 512, 25%%, 64MiB")
    a("--lengths", nargs="+", type=int, metavar="N", help="tokens of prompt; of compile: two; of endless: new ones")
    a("--batches", nargs="+", type=int, metavar="B", help="rows, for speed and memory (1)")
    a(
        "--tasks",
        nargs="+",
        choices=TASKS,
        metavar="TASK",
        help=f"{', '.join(TASKS)}; without it the first {len(STANDARD)}",
    )
    a("--seeds", type=int, metavar="N", help="texts of each task and length")
    a("--depth", type=float, metavar="X", help="quality: needles there, 0 … 1, instead of all over")
    a(
        "--tokens",
        type=int,
        metavar="N",
        help="quality: of the text that fidelity is taken on (32; with --full 64); drafts: new ones (128)",
    )
    a("--floor", type=float, metavar="F", help="what full must solve, 0 … 1, before other scores are shown")
    a("--full", action="store_true", help="quality: more lengths, budgets and texts; goes on where it was broken off")
    a("--gguf", nargs="+", metavar="FILE", help="peers: the same model for llama-bench, as in f16.gguf bf16.gguf")
    a("--llama-bench", default="llama-bench", metavar="PATH")
    a("--json", metavar="FILE", help="the result, also as a file")
    a("--plot", metavar="DIR", help="pictures of it, PNG")
    a("--quiet", action="store_true", help="no progress bars")
    a("--modes", nargs="+", choices=MODES, metavar="MODE", help=f"compile: {', '.join(MODES)}")
    cli.add_compile_flags(p.add_argument_group("runner compile").add_argument)
    return p


def main(argv: Sequence[str]) -> int:
    stdout_is_open = streams.prepare()
    args = parser().parse_args(argv)
    if args.json:
        streams.forgive_output()
    elif not stdout_is_open:
        return cli.fail(PROGRAM, "standard output is closed, so the result would be lost; open it, or give --json FILE")
    return cli.exits(
        PROGRAM,
        lambda: run(args, argv),
        need_less_memory="give smaller --lengths or --batches, or fewer --plans",
        interrupted="interrupted" + ("; the same command goes on from here" if args.full else ""),
    )


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    check(args)
    # a mistake in a plan is told before a model is loaded
    if args.what == "kvpress":
        from evals.peers import pairs_of

        pairs_of(args.plans)
    else:
        plans_of(args, ())
    bar = cli.shows_progress(args.quiet)
    if args.what == "kernels":
        from evals.kernels import need_cuda

        need_cuda()
    dummy = args.random_weights or args.what == "kernels"
    how = cli.compile_options(args) if args.runner == "compile" else None
    llm = load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        runner=args.runner,
        compile_options=how,
        random_weights=dummy,
        bar=bar,
    )
    extra = ["transformers", "kvpress", "optimum-quanto", "hqq"] if args.what in ("peers", "kvpress", "all") else []
    facts = record.facts(llm, ["torch", "triton", *extra])
    print(f"{llm.name} · {facts['machine']} · {llm.dtypes['prefill']}/{llm.dtypes['decode']}", file=sys.stderr)
    job = Job(args, llm, facts, bar)
    parts = dict(
        zip(
            PARTS,
            (quick, quality, codes, speed, compiled, kernels, memory, peers, kvpress, drafts, endless, prose, auto),
            strict=True,
        )
    )
    result = {"what": args.what, "command": record.command(argv), **facts, "plans": {}}
    t0 = time.perf_counter()
    for name in ("quality", "speed", "memory", "peers") if args.what == "all" else (args.what,):
        made = parts[name](job)
        result = {**result, **made, "plans": result["plans"] | made.get("plans", {})}
    result["seconds"] = round(time.perf_counter() - t0, 1)
    print(json.dumps(result), flush=True)
    if args.json:
        write_text("--json", args.json, json.dumps(result, indent=1) + "\n")
    if job.journal:
        job.journal.file.unlink()
    if args.plot:
        from evals.plots import draw

        for file in draw(result, Path(args.plot)):
            print(f"wrote {file}", file=sys.stderr)
    return 0


USES = {  # which part listens to which flag; quick is a small one of quality and speed
    "plans": tuple(part for part in PARTS if part != "auto"),
    "budgets": ("quick", "quality", "speed", "compile", "memory", "peers", "kvpress", "auto"),
    "lengths": PARTS,
    "modes": ("compile",),
    "batches": ("speed", "kernels", "memory"),
    "tasks": ("quick", "quality", "peers", "kvpress"),
    "seeds": ("quick", "quality", "peers", "kvpress", "drafts", "auto"),
    "tokens": ("quality", "drafts", "auto"),
    "floor": ("quick", "quality"),
    "full": ("quality",),
    "depth": ("quality",),
    "gguf": ("peers",),
}


def check(args: argparse.Namespace) -> None:
    for flag, parts in USES.items():
        if getattr(args, flag) not in (None, False) and args.what not in (*parts, "all"):
            raise ValueError(f"--{flag} is of {' and '.join(parts)}, not of {args.what}; leave it out")
    for flag in ("lengths", "batches", "seeds", "tokens"):
        value = getattr(args, flag)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{flag} is {value}; give numbers of at least 1")
    for flag in ("budgets", "tasks", "seeds"):
        if args.what == "peers" and args.plans is not None and getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag} does not go with --plans in peers, which then measures speed alone; leave one out"
            )
    if args.depth is not None and (not 0 <= args.depth <= 1 or args.full):
        raise ValueError(
            f"--depth is {args.depth}; give a place in the text from 0 to 1, and no --full, which takes all"
        )
    if args.what == "drafts" and args.tokens is not None and args.tokens < 8:
        raise ValueError(f"--tokens is {args.tokens}; drafts needs at least 8")
    least = {"endless": 20, "prose": 1000}.get(args.what, 1)
    if min(args.lengths or [least]) < least:
        raise ValueError(f"--lengths is {min(args.lengths)}; {args.what} needs at least {least}")
    if args.what == "quick" and len(args.lengths or [1]) > 1:
        raise ValueError("without a part to run, bench.py takes one length; give one, or run quality or speed")
    check_outputs({"--json": args.json}, {})
    folder = Path(args.plot or ".")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK) or folder.is_file():
        raise ValueError(f"--plot {args.plot} cannot be written; give a folder in a directory of yours")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("--plot needs matplotlib; pip install matplotlib, or leave --plot out") from None


@dataclass
class Job:
    """What every part of a run needs."""

    args: argparse.Namespace
    llm: LLM
    facts: dict
    on: bool  # a terminal watches
    journal: record.Journal | None = None

    def plans(self, *budgets: str) -> dict[str, Plan | Auto]:
        found = plans_of(self.args, budgets)
        return {name: p if isinstance(p, Auto) else self.llm.ready(p) for name, p in found.items()}

    def bar(self, things: Sequence, name: str) -> tqdm:
        return tqdm(things, desc=name, leave=False, disable=not self.on)


def plans_of(args: argparse.Namespace, budgets: Sequence[str]) -> dict[str, Plan | Auto]:
    """Name → plan: the registered ones (of the bare run a few), or the asked ones with full, random and streaming;
    full always first. Of quality, auto may be among those that are asked for.
    """
    if "auto" in (args.plans or ()) and args.what != "quality":
        raise ValueError(
            f"auto takes another plan for each prompt, and {args.what} works on fixed plans; name plans, or run quality"
        )
    texts = QUICK if args.what == "quick" else [*registered(), *TUNED]
    return named(texts if args.plans is None else ["full", "random", "streaming", *args.plans], args.budgets or budgets)


# ---- the parts: each prints its tables and returns its share of the result -------------------------------------------


def quality(job: Job) -> dict:
    args = job.args
    plans = job.plans(*(("50%", "25%", "10%") if args.full else ("25%",)))
    tasks = args.tasks or list(STANDARD)
    lengths, seeds = args.lengths or [1000], args.seeds or (20 if args.full else 5)
    items = [Item(t, n, s, args.depth) for n in lengths for t in tasks for s in range(seeds)]
    if args.full and args.lengths is None and "needle" in tasks:  # the rest of the grid
        items += [Item("needle", n, s) for n in (500, 2000, 3000) for s in range(seeds // 2)]
    texts = [(n, seed) for n in lengths for seed in range(3 if args.full else 1)]
    found = judge(job, plans, items, texts, args.tokens or (64 if args.full else 32))
    print(show.quality(found["quality"]))
    print("".join(f"{line}\n" for line in show.taken(found["quality"])), end="")
    print(
        f"on the text that follows, and where greedy departs from what it writes under full:\n{show.fidelity(found['fidelity'])}\n"
    )
    return found


def judge(job: Job, plans: dict[str, Plan], items: list[Item], texts: list[tuple[int, int]], n: int) -> dict:
    """Tasks and fidelity of all plans; texts: (length, seed) of those on whose next n tokens fidelity is taken."""
    from evals import quality as q

    args, llm, names, chosen = job.args, job.llm, list(plans), list(plans.values())
    if args.full:
        given = {"plans": [str(p) for p in chosen], "fidelity": n}
        job.journal = record.Journal(Path((args.json or "quality.json") + ".part"), job.facts | given)
    done = job.journal.done if job.journal else {}

    def keep(key: str, work: Callable[[], list[dict]]) -> list[dict]:
        if key not in done:
            found = work()
            if job.journal is None:
                return found
            job.journal.keep(key, found)
        return done[key]

    if args.full and not args.quiet:
        estimate(llm, chosen, items, texts, n, done)
    tests = {i: keep(str(i), lambda i=i: q.judge(llm, chosen, i)) for i in job.bar(items, "tasks")}
    near = {
        t: keep(f"fidelity {t}", lambda t=t: q.fidelity(llm, chosen, t[1], t[0], n)) for t in job.bar(texts, "fidelity")
    }
    parts = q.summary(llm.name, names, tests, args.floor)
    means = {
        n: show.averages([p for p in parts if p["length"] == n]) for n in dict.fromkeys(p["length"] for p in parts)
    }
    texts_of = {k: str(p) for k, p in plans.items()}
    result = {"plans": texts_of, "averages": means, "quality": parts, "grid": q.grid(names, tests, parts)}
    return result | {"fidelity": q.merged(names, near)}


def estimate(llm: LLM, plans: list[Plan], items: list[Item], texts: list[tuple[int, int]], n: int, done: dict) -> None:
    """Say what is to do and how long it will take, by two short texts and one stretch of fidelity."""
    from evals import quality as q

    left = [i for i in items if str(i) not in done]
    reads = [t for t in texts if f"fidelity {t}" not in done]
    q.judge(llm, plans[:1], q.Item("needle", 64, 0))  # the process's first products are slow
    cost, small = [], min(i.length for i in items) // 4
    for work in (
        lambda: q.judge(llm, plans, q.Item("multiquery", small, 1)),
        lambda: q.judge(llm, plans, q.Item("multiquery", 2 * small, 1)),
        lambda: q.fidelity(llm, plans[:2], 0, 2 * small, 8),
    ):
        t0 = time.perf_counter()
        work()
        cost.append(time.perf_counter() - t0)
    slope = max(0.0, cost[1] - cost[0]) / small
    seconds = sum(cost[0] + slope * (i.length - small) for i in left) + len(reads) * len(plans) * n / 16 * cost[2]
    print(
        f"plan: {len(plans)} plans × {len(items)} texts under both protocols, fidelity on {len(texts)} texts; "
        f"{len(items) - len(left) + len(texts) - len(reads)} of these are done already; about {seconds / 60:.0f} minutes to go",
        file=sys.stderr,
    )


def codes(job: Job) -> dict:
    from evals import codes as c

    texts = job.args.plans or [t for t in (*registered(), *CODES) if t.startswith("full+") and t != "full+ragged"]
    plans = {text: parse(text) for text in texts}
    found = [r for n in job.args.lengths or [1024] for r in c.codes(job.llm, plans, n)]
    print(f"relative mean squared error of keys and values, none left exact\n{show.codes(found)}\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "codes": found}


def speed(job: Job) -> dict:
    from evals import speed as s

    args, plans, limit = job.args, job.plans("25%"), s.ceiling(job.llm.device)
    print(f"memory bus: this process reads {limit / 1e9:.1f} GB/s; a step reads weights and cache once")
    sizes = [(n, b) for n in args.lengths or [512, 2048, 4096] for b in args.batches or [1]]
    found = [r for n, b in job.bar(sizes, "speed") for r in s.speed(job.llm, plans, n, b, limit)]
    print(show.speed(found) + "\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "ceiling": limit, "speed": found}


def compiled(job: Job) -> dict:
    from evals.compile import measure

    args = job.args
    plans = named(args.plans or COMPILED, args.budgets or ("25%",))
    lengths = tuple(args.lengths or (512, 777))
    if len(lengths) != 2:
        raise ValueError(f"--lengths is {lengths}; compile takes two: the one that is timed, and another one")
    how = [replace(cli.compile_options(args), mode=mode) for mode in args.modes or [args.compile_mode]]
    found = [r for name in job.bar(list(plans), "compile") for r in measure(job.llm, {name: plans[name]}, lengths, how)]
    print(show.compiled(found, lengths) + "\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "lengths": lengths, "compile": found}


def kernels(job: Job) -> dict:
    from evals import kernels as k

    limits = k.ceilings()
    print(" · ".join(f"{name} {value:.3g}" for name, value in limits.items()))
    args = job.args
    if args.plans:  # these alone, on one model
        sizes = [(n, b) for n in args.lengths or (32768,) for b in args.batches or (1,)]
        calls, asked = [], ([(args.model, b, n) for n, b in sizes], ["full", *args.plans])
    else:
        calls, asked = list(job.bar(k.attention(), "kernels")), ()
        print(show.kernels(calls, limits["copy"]) + "\n")
    whole = list(job.bar(k.steps(limits["read"], *asked), "steps"))
    print(show.steps(whole) + "\n")
    return {"ceilings": limits, "kernels": calls, "steps": whole}


def memory(job: Job) -> dict:
    from evals import speed as s

    args, plans = job.args, job.plans("25%")
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    sizes = [(n, b) for n in args.lengths or [512, 4096] for b in args.batches or [1]]
    found = [r for n, b in job.bar(sizes, "memory") for r in s.memory(plans, n, b, model, args.device, args.dtype)]
    print(show.memory(found) + "\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "memory": found}


def peers(job: Job) -> dict:
    from evals import peers as p
    from evals import speed as s

    args, llm, (speed_at, kept) = job.args, job.llm, shares(job.args, "25%", "50%")
    plans = None if args.plans is None else {text: llm.ready(parse(text)) for text in ("full", *args.plans)}
    found, limits = [], [s.ceiling(llm.device)]
    for n in job.bar(args.lengths or [512, 4096], "peers: speed"):
        found += p.speed(llm, args.model, n, speed_at, plans)
        found.append(p.llama_bench(llm, n, args.llama_bench, args.gguf))
        limits.append(s.ceiling(llm.device))
    seen = " to ".join(f"{x / 1e9:.0f}" for x in (min(limits), max(limits)))
    kept_by = f", {speed_at} kept by policies" if plans is None else ""
    print(f"decode in turns{kept_by}; the memory was read at {seen} GB/s between the runs")
    print(show.peers_speed(found) + "\n")
    scores = beside(job, 1000, kept) if plans is None else {}
    return {"ceilings": limits, "peers_speed": found, **scores}


def kvpress(job: Job) -> dict:
    return beside(job, *(job.args.lengths or [1000])[:1], shares(job.args, "50%")[-1])


def shares(args: argparse.Namespace, *default: str) -> tuple[str, str]:
    """The first and the last budget asked for, as kvpress can take them."""
    from evals import peers as p

    budgets = args.budgets or default
    if not all(b.endswith("%") and 0 < p.share(b) <= 1 for b in budgets):
        raise ValueError(
            f"--budgets is {' '.join(budgets)}; kvpress takes shares only: give percents, for speed and for quality"
        )
    return budgets[0], budgets[-1]


def beside(job: Job, length: int, kept: str) -> dict:
    """Both programs on the same texts."""
    from evals import peers as p

    tasks, seeds = job.args.tasks or ["needle", "multikey"], job.args.seeds or 20
    with job.bar(range(2 * len(tasks) * seeds), "quality") as progress:
        pairs = p.pairs_of(job.args.plans)
        scores = p.quality(job.llm, job.args.model, pairs, tasks, length, seeds, kept, progress.update)
    print(f"the same {seeds} texts of {length} tokens, {kept} kept\n{show.peers_quality(scores)}\n")
    return {"peers_quality": scores}


def drafts(job: Job) -> dict:
    from evals import drafts as d

    args = job.args
    plans, seeds, new = args.plans or ("lookup",), args.seeds or 10, args.tokens or 128
    sizes = [(kind, n) for kind in d.KINDS for n in args.lengths or [600]]
    found = []
    with job.bar(range(len(sizes) * seeds * (1 + len(plans))), "drafts") as bar:
        for kind, n in sizes:
            found += d.measure(job.llm, plans, kind, seeds, n, new, DRAFTED, bar.update)
    print(show.drafts(found) + "\n")
    return {"drafts": found}


def endless(job: Job) -> dict:
    from evals import long

    plans, found = {text: job.llm.ready(parse(text)) for text in job.args.plans or ENDLESS}, []
    for n in job.args.lengths or [20_000]:
        for name, plan in plans.items():
            with job.bar(range(n), name) as progress:
                found.append({"plan": name, **long.endless(job.llm, plan, n, progress.update)})
    print(show.endless(found) + "\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "endless": found}


def prose(job: Job) -> dict:
    from evals import long
    from evals.quality import text_of

    plans, found = {text: job.llm.ready(parse(text)) for text in job.args.plans or PROSE}, []
    for n in job.args.lengths or [20_000]:
        ids = text_of(job.llm, 0, n)
        found.append(
            {
                "plan": f"full, pieces of {long.PIECE}" if n > long.PIECE else "full",
                "tokens": n,
                "ppl": long.pieces(job.llm, ids, long.CHUNK),
            }
        )
        for name, plan in plans.items():
            with job.bar(range(n), name) as progress:
                found.append({"plan": name, **long.prose(job.llm, plan, ids, long.CHUNK, progress.update)})
    print(show.prose(found) + "\n")
    return {"plans": {k: str(p) for k, p in plans.items()}, "prose": found}


def auto(job: Job) -> dict:
    from evals import auto as a

    args = job.args
    seeds, n, found = args.seeds or 4, args.tokens or 64, []
    sizes = [(k, b, length) for length in args.lengths or [2000] for b in args.budgets or ["25%"] for k in a.KINDS]
    with job.bar(range(len(sizes) * seeds), "auto") as progress:
        for kind, budget, length in sizes:
            found.append(a.measure(job.llm, kind, budget, length, seeds, n, progress.update))
    print(show.auto(found) + "\n")
    return {"auto": found}


def quick(job: Job) -> dict:
    """Everything small, in one table."""
    from evals import speed as s
    from nanokv.cache.report import mib

    args, plans = job.args, job.plans("25%")
    seeds, length, top = args.seeds or 5, (args.lengths or [1000])[0], job.llm.config.max_position_embeddings
    items = [Item(t, length, seed) for t in args.tasks or STANDARD for seed in range(seeds)]
    found = judge(job, plans, items, [(length, 0)], 32)
    limit, long = s.ceiling(job.llm.device), max(length, min(4 * length, top - 64))
    times = s.speed(job.llm, plans, long, 1, limit)
    rows = []
    for name in plans:
        mean, near = found["averages"][length].get(name), next(f for f in found["fidelity"] if f["plan"] == name)
        t = next(t for t in times if t["plan"] == name)
        cells = [show.percent(mean[k]) for k in ("aware", "agnostic", "turn2")] if mean else ["-"] * 3
        cells += [mib(int(mean["bytes"])), f"{mean['ratio']:.1f}x"] if mean else ["-"] * 2
        cells += ["-"] * 2 if "refused" in near else [f"{near['kl_mean']:.3f}", show.percent(near["top1"])]
        cells += (
            ["-"] * 3
            if "refused" in t
            else [f"{t['prefill_s']:.1f}", f"{t['decode_tok_s']:.1f}", show.percent(t["bus"])]
        )
        rows.append([name, *cells, "-" if "refused" in t else f"{t['full_bytes'] / t['bytes']:.1f}x"])
    head = ["plan", "aware", "agnostic", "turn 2", "cache", "less by", "KL", "same top"]
    print(show.table([*head, f"at {long}: prefill s", "tok/s", "of the bus", "less by"], rows))
    refused = [p["refused"] for p in found["quality"] if "refused" in p]
    refused += [f"{f['plan']}: {f['refused']}" for f in found["fidelity"] if "refused" in f]
    print("\n".join(f"! {r}" for r in refused) or "nothing was refused: full reached its floor in every task")
    print(
        f"\naware, agnostic, turn 2: % solved of {len(found['quality'])} tasks × {seeds} texts of {length} tokens, and the cache there\n"
        f"KL in nats, same top token: against full, on 32 tokens of text after {length}\n"
        f"prefill, decode, cache at {long} tokens; bus: of the {limit / 1e9:.1f} GB/s that this process reads"
    )
    return found | {"ceiling": limit, "speed": times}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
