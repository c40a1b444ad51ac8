"""Whether a change cost speed: two commits take decode steps in turns, and the medians of their times are compared.

`python tests/time_commits.py --old 2fded0c` takes the old commit out of git and times it against the repository this file stands in,
as it is on disk; `--new` names another folder or commit. One child process per side holds the same model, plan and prompt. The
sides take turns of a few steps, so that a machine whose speed drifts slows both. Not collected by pytest: it needs two commits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from compare_commits import checkout, encode, make_session, parse_plan, start

PLANS = "full", "snapkv:budget=512", "h2o:budget=512", "full+int8"


class Side:
    """A child process over one checkout. `ask` sends it a request and waits for the answer."""

    def __init__(self, checkout: Path, weights: Path, runner: str) -> None:
        env = {**os.environ, "NANOKV_WEIGHTS": str(weights), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--child", runner]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=checkout, env=env, stdin=pipe, stdout=pipe, text=True)

    def ask(self, **request: Any) -> list[float]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("time_commits: a side ended; see its traceback above")
        return json.loads(answer)


def child(runner: str) -> None:
    """Answer requests: {plan, length, room} starts a session and gives the seconds of its prefill, {steps} gives each step's seconds."""
    sys.path.insert(0, str(Path.cwd()))
    out = os.fdopen(os.dup(1), "w")  # what the library prints must not be taken for an answer
    os.dup2(2, 1)
    import torch

    import nanokv
    from evals.quality import text_of

    llm = nanokv.load("smollm2-135m", device="cpu", runner=runner)
    encode(llm, "warm")
    session = logits = None
    with torch.inference_mode():
        for line in sys.stdin:
            request, times = json.loads(line), []
            for _ in range(request.get("steps", 1)):
                t0 = time.perf_counter()
                if "plan" in request:
                    session = make_session(llm, parse_plan(llm, request["plan"], None), request["room"])
                    logits = start(session, [text_of(llm, 0, request["length"])])
                else:
                    logits = session.feed(logits.argmax(-1, keepdim=True))
                times.append(time.perf_counter() - t0)
            out.write(json.dumps(times) + "\n")
            out.flush()


def time_plan(sides: dict[str, Side], plan: str, length: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return the median seconds of a step on each side, and the ratio old/new of each round's medians in order."""
    for side in sides.values():
        side.ask(plan=plan, length=length, room=(rounds + 1) * steps)
    for side in sides.values():
        side.ask(steps=steps)  # compiles, and warms the machine's caches
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 else -1]:  # which side comes first alternates
            times[name].append(sides[name].ask(steps=steps))
    medians = {name: median(t for r in found for t in r) for name, found in times.items()}
    ratios = sorted(median(a) / median(b) for a, b in zip(times["old"], times["new"], strict=True))
    return {"plan": plan, "length": length, **medians, "ratio": medians["old"] / medians["new"], "ratios": ratios}


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="time_commits", description=__doc__.split("\n\n")[0])
    p.add_argument("--old", default="2fded0c", metavar="FOLDER|COMMIT")
    p.add_argument("--new", default=str(Path(__file__).resolve().parent.parent), metavar="FOLDER|COMMIT")
    p.add_argument("--plans", nargs="+", default=list(PLANS), metavar="PLAN")
    p.add_argument("--lengths", nargs="+", type=int, default=[512, 4096], metavar="N", help="tokens of prompt")
    p.add_argument("--runners", nargs="+", default=["eager", "compile"], metavar="R")
    p.add_argument("--rounds", type=int, default=12, help="turns of each side (12)")
    p.add_argument("--steps", type=int, default=8, help="steps in a turn (8)")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--child", metavar="RUNNER", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        child(args.child)
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="time-") as folder:
        places = {name: checkout(getattr(args, name), Path(folder) / name) for name in ("old", "new")}
        sys.path.insert(0, str(places["new"]))
        from weights.fetch import locate

        weights = locate("smollm2-135m").resolve().parent
        for runner in args.runners:
            sides = {name: Side(place, weights, runner) for name, place in places.items()}
            try:
                for length in args.lengths:
                    for plan in args.plans:
                        rows.append({"runner": runner, **time_plan(sides, plan, length, args.rounds, args.steps)})
                        r = rows[-1]
                        low, high = r["ratios"][len(r["ratios"]) // 4], r["ratios"][-1 - len(r["ratios"]) // 4]
                        print(
                            f"{runner:8}{length:6} {plan:20} old {1e3 * r['old']:7.2f} ms  new {1e3 * r['new']:7.2f} ms  "
                            f"old/new {r['ratio']:.3f}, rounds {low:.3f} … {high:.3f}",
                            flush=True,
                        )
            finally:
                for side in sides.values():
                    side.process.kill()
                    side.process.wait()
    if args.json:
        args.json.write_text(json.dumps({"old": args.old, "new": args.new, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
