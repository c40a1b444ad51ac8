"""Long runs: thousands of generated tokens under a budget, and the perplexity of a text beyond the model's context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from evals.quality import text_of
from evals.speed import stepper, timed
from nanokv.cache.plan import Plan
from nanokv.llm import LLM

PROMPT = 200  # tokens of the prompt before the generated ones
CHUNK = 256  # tokens of a text that are fed at once
PIECE = 4096  # tokens per piece of full attention; a shorter context sets a smaller piece


def endless(llm: LLM, plan: Plan, n: int, tick: Callable[[int], object] = lambda _: None) -> dict:
    """Generate n ≥ 20 tokens from a short prompt, past the model's context if necessary.

    Returns tokens/s in the second and in the last twentieth, and after each tenth the bytes and the tokens of the
    longest head. tick(1) is called for every token.
    """
    session = llm.session(n, plan=plan)
    step, seconds, sizes, longest = stepper(session, session.start([text_of(llm, 0, PROMPT)])), [], [], []
    for i in range(n):
        seconds.append(timed(step, llm.device))
        tick(1)
        if (i + 1) % (n // 10) == 0:
            report = session.report()
            sizes.append(report.bytes)
            longest.append(max(max(row) for layer in report.layers for row in layer.kept))
    twentieth = n // 20
    early, late = (twentieth / sum(part) for part in (seconds[twentieth : 2 * twentieth], seconds[-twentieth:]))
    rate = {"early_tok_s": early, "late_tok_s": late, "minutes": sum(seconds) / 60}
    return {"new_tokens": n, **rate, "bytes": sizes, "held": longest}


def prose(llm: LLM, plan: Plan, ids: Sequence[int], chunk: int, tick: Callable[[int], object] = lambda _: None) -> dict:
    """Feed a text in chunks under a plan. Returns the perplexity without the first fifth, and the bytes at the end."""
    session, nll = llm.session(len(ids), plan=plan), []
    before = session.start([ids[:chunk]])
    for a in range(chunk, len(ids), chunk):
        part = torch.tensor([ids[a : a + chunk]], device=llm.device)
        logits = session.feed(part, every_logit=True)[0]
        nll.append(_nll(before, logits, part[0]))
        before = logits[-1:]
        tick(part.shape[1])
    scored = torch.cat(nll)[max(0, len(ids) // 5 - chunk) :]
    return {"tokens": len(ids), "ppl": math.exp(scored.mean().item()), "bytes": session.report().bytes}


def pieces(llm: LLM, ids: Sequence[int], chunk: int) -> float:
    """Return the perplexity of the same tokens under full attention. A long text is fed in overlapping pieces."""
    size = min(PIECE, llm.config.max_position_embeddings)
    nll: dict[int, torch.Tensor] = {}  # index of a piece's first scored token → losses from there on
    for a in range(0, max(1, len(ids) - size // 2), size // 2):
        begin, part = a + size // 2 if a else chunk, torch.tensor([ids[a : a + size]], device=llm.device)
        session = llm.session(part.shape[1], plan=Plan())
        before = session.start([ids[a:begin]])
        rest = part[:, begin - a :]
        nll[begin] = _nll(before, session.feed(rest, every_logit=True)[0], rest[0])
    starts = [*nll, len(ids)]
    # a token that two pieces score counts in the later one
    scored = torch.cat([x[: b - a] for (a, x), b in zip(nll.items(), starts[1:], strict=True)])
    return math.exp(scored[max(0, len(ids) // 5 - chunk) :].mean().item())


def _nll(before: torch.Tensor, logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihoods (n,) of a text.

    before (1,vocab) are the logits before the text, logits (n,vocab) those after each token.
    """
    return torch.nn.functional.cross_entropy(torch.cat((before, logits[:-1])).float(), text, reduction="none")
