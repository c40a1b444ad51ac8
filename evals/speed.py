"""Seconds and bytes: prefill, decode steps and their share of the memory bus, receipts, and peaks of processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from evals.quality import text_of
from nanokv.cache import Report
from nanokv.llm import LLM
from nanokv.plan import Plan

ROUNDS, STEPS, WARM = (
    3,
    8,
    2,
)  # steps of every runner in turn, so that each warms its own caches; the first of a round not counted


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until it is really done."""
    t0 = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - t0


def ceiling(device: torch.device) -> float:
    """Bytes per second that this process reads from the device's memory: the sum of one GiB of fp32, the best of ten."""
    data = torch.ones(2**28, device=device)
    return data.nbytes / min(timed(lambda: data.sum().item(), device) for _ in range(10))


def in_turn(steps: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each one's step, all taking turns in rounds."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for step, mine in zip(steps, times, strict=True):
            mine += [timed(step, device) for _ in range(STEPS)][WARM:]
    return [median(t) for t in times]


def weight_bytes(llm: LLM) -> int:
    """What a step must read of the weights: everything but an embedding that is not the head too."""
    model = llm.models.decode
    tied = model.lm_head.weight is model.embed_tokens.weight
    skipped = 0 if tied else model.embed_tokens.weight.nbytes
    return sum(p.nbytes for p in model.parameters()) - skipped


def speed(llm: LLM, plans: Sequence[Plan], length: int, batch: int, limit: float) -> list[dict]:
    """Prefill and decode of every plan at one length and batch; the decode steps take turns. limit: bytes per second, see `ceiling`."""
    room, prompts = ROUNDS * STEPS + 1, [text_of(llm, seed, length) for seed in range(batch)]
    weights, sessions, steps, records = weight_bytes(llm), [], [], []
    llm.session(1).start([text_of(llm, 0, 64)])  # the process's first products are slow
    for i, plan in enumerate(plans):
        try:
            plan.fit(llm.config, llm.models.context.dtype, length, room, batch)
        except ValueError as e:
            records.append({"plan": i, "length": length, "batch": batch, "refused": str(e)})
            continue
        session, out = llm.session(room, plan=plan), []
        seconds = timed(lambda s=session, out=out: out.append(s.start(prompts)), llm.device)
        sessions.append(session)
        steps.append(_stepper(session, out[0]))
        records.append({"plan": i, "length": length, "batch": batch, "prefill_s": seconds})
    ready = [r for r in records if "refused" not in r]
    for r, session, seconds in zip(ready, sessions, in_turn(steps, llm.device), strict=True):
        report = session.report()
        share = (weights + report.live_bytes) / seconds / limit
        r |= {"decode_tok_s": batch / seconds, "bus": share} | kinds(report, llm.config.head_dim)
    return records


def _stepper(session, logits: torch.Tensor) -> Callable[[], None]:
    state = [logits]

    def step() -> None:
        state[0] = session.feed(state[0].argmax(-1, keepdim=True))

    return step


def kinds(report: Report, dim: int) -> dict:
    """The receipt's bytes by what they are for. Scales count to the K and V that they belong to."""
    own = [x for x in report.layers if x.bytes]
    held = [sum(n for row in x.kept for n in row) * dim / 8 for x in own]
    k = int(sum(n * x.k_bits for n, x in zip(held, own, strict=True)))
    v = int(sum(n * x.v_bits for n, x in zip(held, own, strict=True)))
    by_kind = {"K": k, "V": v, "positions": report.live_bytes - k - v, "reserved": report.bytes - report.live_bytes}
    return {"bytes": report.bytes, "full_bytes": report.full_bytes, "host": report.host_bytes, "kinds": by_kind}


def memory(llm: LLM, name: str, plans: Sequence[str], lengths: Sequence[int], flags: Sequence[str]) -> list[dict]:
    """Receipt and peak of `generate.py`, one process for every plan and length: a peak belongs to a process."""
    records = []
    for length in lengths:
        with tempfile.TemporaryDirectory() as tmp:
            prompt, result = Path(tmp) / "prompt.txt", Path(tmp) / "result.json"
            prompt.write_text(llm.tokenizer.decode(text_of(llm, 0, length)), encoding="utf-8")
            for i, plan in enumerate(plans):
                command = [
                    sys.executable,
                    "generate.py",
                    "--model",
                    name,
                    "--policy",
                    plan,
                    "--prompt-file",
                    str(prompt),
                ]
                command += ["-n", "8", "--ignore-eos", "--quiet", "--json", str(result), *flags]
                done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
                if done.returncode:
                    records.append({"plan": i, "length": length, "refused": done.stderr.strip().partition(": ")[2]})
                    continue
                made = json.loads(result.read_text(encoding="utf-8"))
                cache = {k: made["cache"][k] for k in ("bytes", "live_bytes", "host_bytes", "full_bytes")}
                row = {"plan": i, "length": length, "tokens": made["prompt_tokens"], "peak_bytes": made["peak_bytes"]}
                records.append(row | cache)
    return records
