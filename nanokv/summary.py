"""What is reported about one run: the first line and the last lines on stderr, and the record that --json writes.

It reads a finished answer and its session. It prints nothing and writes no file.
"""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanokv.answer import Answer
from nanokv.cache.report import mib
from nanokv.device import peak_bytes
from nanokv.engine import Session
from nanokv.llm import LLM
from nanokv.speculate import Speculation


def first_line(llm: LLM, plan: str) -> str:
    """What runs: the model, the plan, the device, the types, the backend and the runner."""
    types, backend = llm.dtypes, llm.models.ops.name
    cache = "" if llm.cache_dtype == types["decode"] else f", cache {llm.cache_dtype}"
    if why := llm.models.ops.why:
        backend += f" ({why})"
    return (
        f"{llm.name} · {plan} · {llm.device} · prefill {types['prefill']}, decode {types['decode']}{cache} ({llm.why_dtype}) · "
        f"backend {backend} · runner {llm.models.runner.name}"
    )


def end_block(llm: LLM, answer: Answer) -> str:
    """The lines after an answer: timings, peak memory, notes on the cache, and the receipt as the last line."""
    session, report = answer.session, answer.session.report()
    policy, store = session.plan.names[:2]
    compile_time = f", compile {answer.compile_s:.2f} s" if answer.compile_s else ""
    chunked = "; prefilled in chunks, so the whole prompt's cache was alive at once" if session.chunk else ""
    prefill_rate, decode_rate = _rates(answer)
    beams = f"best of {answer.beams} beams; " if answer.beams > 1 else ""
    without = "" if answer.speculation or answer.beams > 1 else " (without the first step, the warm-up)"
    lines = [
        f"load {llm.load_s:.2f} s{compile_time}",
        f"prefill {answer.prompt_tokens} tok, {answer.prefill_s:.2f} s, {prefill_rate:.0f} tok/s",
        *([scoring_passes(session)] if session.passes and answer.lengths else []),
        f"decode {answer.counted} tok, {answer.decode_s:.2f} s, {decode_rate:.1f} tok/s{without}; "
        f"{beams}ended by {', '.join(dict.fromkeys(answer.reasons))}",
        *([drafts(answer.speculation)] if answer.speculation else []),
        f"peak memory {mib(peak_bytes(llm.device))}{chunked}",
    ]
    if policy != "full" and not report.evicting_layers and not session.plan.policy.demotes:
        lines.append(f"{policy} had nothing to evict: every layer still holds all {max(report.seen)} tokens")
    notes = [session.plan.store.notice(n) for n in dict.fromkeys(answer.lengths)]
    lines += [f"{store}: {note}" for note in notes if note]
    unused = report.bytes - report.used_bytes
    if unused > 0.1 * report.bytes:
        lines.append(
            f"{mib(unused)} of the cache are empty slots: room for more new tokens (-n), or padding up to the longest head or row"
        )
    return "\n".join([*lines, str(report)])


def scoring_passes(session: Session) -> str:
    """What the passes cost that only scored the prompts."""
    tokens, seconds = (sum(getattr(x, k) for x in session.passes) for k in ("tokens", "seconds"))
    held = max(x.bytes for x in session.passes)
    return (
        f"{session.plan.names[0]} scored with {tokens} more tok, {seconds:.2f} s of these; the whole prompt's cache, "
        f"{mib(held)}, was alive until then"
    )


def drafts(of: Speculation) -> str:
    """How often the drafts were right."""
    found = f"{of.accepted} of {of.drafted} tokens accepted"
    if of.passes:
        found += f", {1 + of.accepted / of.passes:.2f} tokens in each of {of.passes} passes"
    return f"drafts by {of.draft.name}: {found}; their own cache takes {mib(of.draft.cache_bytes())}"


def as_record(llm: LLM, answer: Answer) -> dict[str, Any]:
    """The run as --json writes it. Several answers are a list under "rows"."""
    report = answer.session.report()
    prefill_rate, decode_rate = _rates(answer)
    common = {
        "model": llm.name,
        "device": str(llm.device),
        "dtype": llm.dtypes,
        "cache_dtype": llm.cache_dtype,
        "backend": llm.models.ops.name,
        "runner": llm.models.runner.name,
        "torch": torch.__version__,
        "commit": _commit(),
        "prompt_tokens": answer.prompt_tokens,
        "load_s": llm.load_s,
        "compile_s": answer.compile_s,
        "prefill_s": answer.prefill_s,
        "decode_s": answer.decode_s,
        "prefill_tok_s": prefill_rate,
        "decode_tok_s": decode_rate,
        "peak_bytes": peak_bytes(llm.device),
    }
    if answer.beams > 1:
        common["beams"] = {"n": answer.beams, "score": answer.score}
    if answer.lengths and (passes := answer.session.passes):
        common["scoring_passes"] = [asdict(x) for x in passes]
    if made := answer.speculation:
        common["draft"] = {"by": made.draft.name, **{k: getattr(made, k) for k in ("passes", "drafted", "accepted")}}
    rows = [
        {
            **common,
            "policy": str(answer.session.plans[i]),
            "new_tokens": len(ids),
            "text": answer.texts[i],
            "token_ids": ids,
            "finish_reason": answer.reasons[i],
            "cache": report.as_dict(i),
        }
        for i, ids in enumerate(answer.ids)
    ]
    return rows[0] if len(rows) == 1 else {"rows": rows}


def _rates(answer: Answer) -> tuple[float, float]:
    """Tokens per second of prefill and of decode."""
    amounts = (answer.prompt_tokens, answer.prefill_s), (answer.counted, answer.decode_s)
    prefill, decode = (tokens / seconds if seconds else 0.0 for tokens, seconds in amounts)
    return prefill, decode


def _commit() -> str | None:
    """The project's commit, if it runs from a checkout."""
    command, folder = ["git", "rev-parse", "--verify", "-q", "HEAD"], Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
