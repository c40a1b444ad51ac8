"""Compare two caches on the same text: KL divergence, agreement, perplexity and first difference.

These measures show damage that task accuracy can hide. Both caches are fed the same tokens one at a time, as in
decoding, so tokens that a policy evicts during decoding count too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.plan import Plan
from nanokv.engine import Session
from nanokv.llm import LLM
from nanokv.text.sampler import finite


@dataclass(frozen=True)
class Fidelity:
    """Results on `tokens` tokens of one text. KL(reference ‖ other) is in nats."""

    tokens: int
    kl_mean: float
    kl_p99: float
    top1: float  # share of positions where both have the same most likely token
    ppl_reference: float
    ppl: float
    first: int | None  # index of the first token where the most likely tokens differ; None: nowhere

    def __str__(self) -> str:
        change = f"perplexity {self.ppl_reference:.3f} there, {self.ppl:.3f} here"
        first = (
            "same greedy choice everywhere"
            if self.first is None
            else f"first different choice at token {self.first + 1}"
        )
        kl = f"KL mean {self.kl_mean:.4f}, 99 % {self.kl_p99:.4f} nats"
        return f"{self.tokens} tokens · {kl} · same top token {self.top1:.1%} · {change} · {first}"


def follow(
    session: Session, logits: Tensor, n: int, choose: Callable[[int, Tensor], int], eos: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """Feed one row up to n tokens. Token i is choose(i, logits (vocab,)).

    Returns the tokens, and the fp32 logits (n,vocab) before each of them. Ends early after a token of `eos`.
    """
    tokens, rows = [], []
    while True:
        rows.append(finite(logits)[0].float())
        tokens.append(choose(len(tokens), rows[-1]))
        if len(tokens) == n or tokens[-1] in eos:
            return tokens, torch.stack(rows)
        logits = session.feed(torch.tensor([tokens[-1:]], device=logits.device))


def greedy(_: int, logits: Tensor) -> int:
    """Choose the most likely token."""
    return int(logits.argmax())


def losses(reference: Tensor, other: Tensor, text: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, per token: KL, whether the most likely tokens agree, and the text's negative log-likelihood under each.

    The arguments are those of `compare`.
    """
    p, q = (finite(x).double().log_softmax(-1) for x in (reference, other))
    at = torch.tensor(text, device=p.device)[:, None]
    nll = [-x.gather(-1, at)[:, 0] for x in (p, q)]
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1), *nll


def compare(reference: Tensor, other: Tensor, text: Sequence[int], skip: int = 0) -> Fidelity:
    """Compare logits (n,vocab), which two caches gave before each of the n tokens of a text.

    The first `skip` tokens count only for `Fidelity.first`.
    """
    kl, same, *nll = losses(reference, other, text)
    different = (~same).nonzero().flatten().tolist()
    kl, agree = kl[skip:], same[skip:].double()
    ppl = [x[skip:].mean().exp().item() for x in nll]
    share = agree.mean().item()
    return Fidelity(
        len(kl), kl.mean().item(), kl.quantile(0.99).item(), share, *ppl, different[0] if different else None
    )


def against(
    llm: LLM,
    reference: Plan,
    ids: Sequence[int],
    then: Sequence[int],
    n: int,
    eos: Sequence[int],
    overflow: bool,
    chunk: int | None,
) -> Fidelity:
    """Compare the model's plan with `reference` on up to n tokens, which greedy decoding under `reference` writes.

    `ids` is the prompt, and `then` is fed after its compression. Without it the first token is left out, because its
    logits come from the dense prompt and are the same under every plan.
    """

    def run(plan: Plan, limit: int, choose: Callable[[int, Tensor], int]) -> tuple[list[int], Tensor]:
        session = llm.session(len(then) + n, chunk, plan)
        turn = llm.answer(session, [ids], then=then, limit=n, overflow=overflow)
        return follow(session, turn.logits, limit, choose, eos)

    text, expected = run(reference, n, greedy)
    _, actual = run(llm.plan, len(text), lambda i, _: text[i])
    return compare(expected, actual, text, skip=0 if then or len(text) == 1 else 1)
