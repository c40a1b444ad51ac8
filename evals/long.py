"""Long runs: thousands of generated tokens under a budget, and the perplexity of a text far longer than the model's context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from evals.quality import text_of
from evals.speed import stepper, timed
from nanokv.cache.plan import Plan
from nanokv.llm import LLM

PROMPT = 200  # tokens before the generated ones
CHUNK = 256  # tokens of a text fed at once
PIECE = 4096  # tokens of full attention that long texts are measured against, or the context if that is less


def endless(llm: LLM, plan: Plan, n: int, tick: Callable[[int], object] = lambda _: None) -> dict:
    """n ≥ 20 tokens generated from a short prompt, past the model's context if need be. Tokens/s of the second twentieth and of the last
    one, bytes and the longest head after each tenth.
    """
    session = llm.session(n, plan=plan)
    step, seconds, sizes, held = stepper(session, session.start([text_of(llm, 0, PROMPT)])), [], [], []
    for i in range(n):
        seconds.append(timed(step, llm.device))
        tick(1)
        if (i + 1) % (n // 10) == 0:
            report = session.report()
            sizes.append(report.bytes)
            held.append(max(max(row) for layer in report.layers for row in layer.kept))
    twentieth = n // 20
    early, late = (twentieth / sum(part) for part in (seconds[twentieth : 2 * twentieth], seconds[-twentieth:]))
    rate = {"early_tok_s": early, "late_tok_s": late, "minutes": sum(seconds) / 60}
    return {"new_tokens": n, **rate, "bytes": sizes, "held": held}


def prose(llm: LLM, plan: Plan, ids: Sequence[int], chunk: int, tick: Callable[[int], object] = lambda _: None) -> dict:
    """Perplexity of a text fed in chunks under a plan, judged from its first fifth on, and the bytes at its end."""
    session, nll = llm.session(len(ids), plan=plan), []
    before = session.start([ids[:chunk]])
    for a in range(chunk, len(ids), chunk):
        part = torch.tensor([ids[a : a + chunk]], device=llm.device)
        logits = session.feed(part, each=True)[0]
        nll.append(_nll(before, logits, part[0]))
        before = logits[-1:]
        tick(part.shape[1])
    judged = torch.cat(nll)[max(0, len(ids) // 5 - chunk) :]
    return {"tokens": len(ids), "ppl": math.exp(judged.mean().item()), "bytes": session.report().bytes}


def pieces(llm: LLM, ids: Sequence[int], chunk: int) -> float:
    """Perplexity of the same tokens under full attention, in overlapping pieces if they do not fit in one."""
    size = min(PIECE, llm.config.max_position_embeddings)
    nll: dict[int, torch.Tensor] = {}  # the first token judged → of it and those that follow
    for a in range(0, max(1, len(ids) - size // 2), size // 2):
        begin, part = a + size // 2 if a else chunk, torch.tensor([ids[a : a + size]], device=llm.device)
        session = llm.session(part.shape[1], plan=Plan())
        before = session.start([ids[a:begin]])
        rest = part[:, begin - a :]
        nll[begin] = _nll(before, session.feed(rest, each=True)[0], rest[0])
    starts = [*nll, len(ids)]
    whole = torch.cat(
        [x[: b - a] for (a, x), b in zip(nll.items(), starts[1:], strict=True)]
    )  # a token's first judge counts
    return math.exp(whole[max(0, len(ids) // 5 - chunk) :].mean().item())


def _nll(before: torch.Tensor, logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Logits before a text (1,vocab) and after each of its tokens (n,vocab) → their negative log-likelihoods (n,)."""
    return torch.nn.functional.cross_entropy(torch.cat((before, logits[:-1])).float(), text, reduction="none")
