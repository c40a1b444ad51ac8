"""Long runs: thousands of generated tokens under a budget, and the perplexity of a text far longer than the model's context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from evals.quality import text_of
from evals.speed import stepper, timed
from nanokv.llm import LLM, peak_bytes
from nanokv.plan import Plan

PROMPT = 200  # tokens before the generated ones
CHUNK = 256  # tokens of a text fed at once
PIECE, STRIDE = (
    4096,
    2048,
)  # the reference for texts beyond the context: full attention in pieces, each judged from its middle on


def endless(llm: LLM, plan: Plan, n: int, tick: Callable[[int], object] = lambda _: None) -> dict:
    """n tokens generated from a short prompt, past the model's context if need be. Tokens/s of the second twentieth and of the last one,
    bytes and the longest head after each tenth, and by how much the process's peak grew after the first.
    """
    session = llm.session(n, plan=plan)
    step, seconds, sizes, held, peaks = stepper(session, session.start([text_of(llm, 0, PROMPT)])), [], [], [], []
    for i in range(n):
        seconds.append(timed(step, llm.device))
        tick(1)
        if (i + 1) % (n // 10) == 0:
            report = session.report()
            sizes.append(report.bytes)
            held.append(max(max(row) for layer in report.layers for row in layer.kept))
            peaks.append(peak_bytes(llm.device))
    twentieth = n // 20
    early, late = (twentieth / sum(part) for part in (seconds[twentieth : 2 * twentieth], seconds[-twentieth:]))
    rate = {"early_tok_s": early, "late_tok_s": late, "minutes": sum(seconds) / 60}
    return {"new_tokens": n, **rate, "bytes": sizes, "held": held, "peak_grew": peaks[-1] - peaks[0]}


def prose(llm: LLM, plan: Plan, ids: Sequence[int], chunk: int, tick: Callable[[int], object] = lambda _: None) -> dict:
    """Perplexity of a text fed in chunks under a plan, judged from its first fifth on, and the bytes at its end."""
    session, nll, logits = llm.session(len(ids), plan=plan), [], []
    for a in range(0, len(ids), chunk):
        part = ids[a : a + chunk]
        if a == 0:
            session.start([part])
        else:
            logits = session.feed(torch.tensor([part], device=llm.device), every=True)[0]
            nll.append(_nll(logits[:-1], part[1:]))  # a chunk's first token is judged by nobody: one in `chunk`
        tick(len(part))
    report, first = session.report(), max(0, len(ids) // 5 // chunk - 1)
    return {"tokens": len(ids), "ppl": math.exp(torch.cat(nll[first:]).mean().item()), "bytes": report.bytes}


@torch.inference_mode()
def pieces(llm: LLM, ids: Sequence[int]) -> float:
    """Perplexity of the same tokens under full attention in overlapping pieces."""
    nll = []
    for a in range(0, len(ids) - STRIDE, STRIDE):
        part = list(ids[a : a + PIECE])
        session = llm.session(len(part) - STRIDE, plan=Plan())
        session.start([part[:STRIDE]])
        logits = session.feed(torch.tensor([part[STRIDE:]], device=llm.device), every=True)[0]
        nll.append((a + STRIDE + 1, _nll(logits[:-1], part[STRIDE + 1 :])))
    first = len(ids) // 5
    return math.exp(torch.cat([x[max(0, first - at) :] for at, x in nll]).mean().item())


def _nll(logits: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
    """logits (n,vocab) before each of n tokens → their negative log-likelihoods (n,)."""
    at = torch.tensor(text, device=logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), at, reduction="none")
