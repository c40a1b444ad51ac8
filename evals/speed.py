"""Measure prefill, decode steps, their share of the memory bandwidth, the receipt's bytes and the peak of memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from evals.quality import servable, text_of
from nanokv import load
from nanokv.cache.plan import Plan
from nanokv.cache.report import Report
from nanokv.device import peak_bytes
from nanokv.engine import Session
from nanokv.llm import LLM
from nanokv.text.sampler import likeliest

ROOT = Path(__file__).parent.parent
# every round takes STEPS steps of each runner; the first WARM of them warm up its caches and are not counted
ROUNDS, STEPS, WARM = 3, 8, 2


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the work is finished on the device."""
    t0 = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - t0


def ceiling(device: torch.device) -> float:
    """Return the bytes per second that this process reads from memory: the best of ten sums over 1 GiB of fp32."""
    data = torch.ones(2**28, device=device)
    times = 1 if device.type == "cpu" else 16  # repeat on a GPU, so that the launch does not count
    return times * data.nbytes / min(timed(lambda: [data.sum() for _ in range(times)], device) for _ in range(10))


def alternate(steps: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the median seconds of each runner's step. The runners alternate in rounds."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for step, seconds in zip(steps, times, strict=True):
            seconds += [timed(step, device) for _ in range(STEPS)][WARM:]
    return [median(t) for t in times]


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights that a step must read: all except an embedding that is not also the head."""
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    heads = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    skipped = sum(table.nbytes for table in tables if not any(table is head for head in heads))
    return sum(p.nbytes for p in model.parameters()) - skipped


def speed(llm: LLM, plans: dict[str, Plan], length: int, batch: int, limit: float) -> list[dict]:
    """Time prefill and decode of every plan at one length and batch. The plans' decode steps alternate.

    `limit` is the bandwidth that `ceiling` returns.
    """
    room, prompts = ROUNDS * STEPS + 1, [text_of(llm, seed, length) for seed in range(batch)]
    good, refused = servable(llm, list(plans.values()), length, room, batch)
    names, weights = list(plans), weight_bytes(llm.models.decode)
    records = [{"plan": names[i], "length": length, "batch": batch, "refused": reason} for i, reason in refused.items()]
    llm.session(room).start(prompts[:1])  # the first matrix products of a new shape are slow
    ready, sessions, steps = [], [], []
    for i in good:
        session, out = llm.session(room, plan=plans[names[i]]), []
        seconds = timed(lambda s=session, out=out: out.append(s.start(prompts)), llm.device)
        sessions.append(session)
        steps.append(stepper(session, out[0]))
        ready.append({"plan": names[i], "length": length, "batch": batch, "prefill_s": seconds})
    for r, session, seconds in zip(ready, sessions, alternate(steps, llm.device), strict=True):
        report = session.report()
        share = (weights + report.used_bytes) / seconds / limit
        r |= {"decode_tok_s": batch / seconds, "bus": share} | bytes_by_use(report, llm.config.head_dim)
    return ready + records


def stepper(session: Session, logits: torch.Tensor) -> Callable[[], None]:
    """Return a function that takes one greedy step per call, starting from the logits (B,vocab)."""
    state = [logits]

    def step() -> None:
        state[0] = session.feed(likeliest(state[0])[:, None])

    return step


def bytes_by_use(report: Report, dim: int) -> dict:
    """Split the receipt's bytes by use. Scales count as part of their K or V."""
    own = [x for x in report.layers if x.bytes]
    units = [sum(n for row in x.kept for n in row) * dim / 8 for x in own]  # bytes at one bit per element
    k = int(sum(n * x.k_bits for n, x in zip(units, own, strict=True)))
    v = int(sum(n * x.v_bits for n, x in zip(units, own, strict=True)))
    by_kind = {"K": k, "V": v, "positions": report.used_bytes - k - v, "reserved": report.bytes - report.used_bytes}
    return {"bytes": report.bytes, "full_bytes": report.full_bytes, "host": report.host_bytes, "kinds": by_kind}


def memory(plans: dict[str, Plan], length: int, batch: int, model: str, device: str, dtype: str) -> list[dict]:
    """Measure the receipt and the peak of memory of every plan, each in its own process."""
    records = []
    for name, plan in plans.items():
        row = {"plan": name, "length": length, "batch": batch}
        what = [str(plan), str(length), str(batch), model, device, dtype]
        done = subprocess.run([sys.executable, "-m", "evals.speed", *what], cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, 2):
            raise RuntimeError(f"{name} at {length} tokens died ({done.returncode}): {done.stderr[-300:]}")
        found = {"refused": done.stderr.strip()} if done.returncode else json.loads(done.stdout)
        records.append(row | found)
    return records


def measure(plan: str, length: int, batch: int, model: str, device: str, dtype: str) -> dict:
    """Run one plan in this process (prompts and eight steps) and return its receipt and peak of memory."""
    llm = load(model, plan, device=device, dtype=dtype)
    session = llm.session(8)
    step = stepper(session, session.start([text_of(llm, seed, length) for seed in range(batch)]))
    for _ in range(8):
        step()
    report = session.report()
    sizes = {k: getattr(report, k) for k in ("bytes", "host_bytes", "full_bytes")} | {"live_bytes": report.used_bytes}
    return {**sizes, "peak_bytes": peak_bytes(llm.device)}


if __name__ == "__main__":
    try:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])))
    except ValueError as e:
        sys.exit(print(e, file=sys.stderr) or 2)
