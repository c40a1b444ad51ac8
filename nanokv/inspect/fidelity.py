"""How far a compressed cache strays from another one on the same text: KL divergence, agreement, perplexity, first difference.

Accuracy on tasks can hide damage that these show at once. Both caches are stepped through the same tokens one at a time, as
decode does, so that what a policy drops on the way counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.plan import Plan
from nanokv.engine import Session
from nanokv.llm import LLM


@dataclass(frozen=True)
class Fidelity:
    """Of n tokens of one text. KL in nats, from the reference's distribution to the other's."""

    tokens: int
    kl_mean: float
    kl_p99: float
    top1: float  # share of tokens for which both would choose the same next one
    ppl_reference: float
    ppl: float
    first: int | None  # the first token that greedy would choose otherwise

    def __str__(self) -> str:
        change = f"perplexity {self.ppl_reference:.3f} → {self.ppl:.3f}"
        first = "never another choice" if self.first is None else f"first another choice at token {self.first + 1}"
        kl = f"KL mean {self.kl_mean:.4f}, 99 % {self.kl_p99:.4f} nats"
        return f"{self.tokens} tokens · {kl} · same top token {self.top1:.1%} · {change} · {first}"


def follow(
    session: Session, logits: Tensor, n: int, choose: Callable[[int, Tensor], int], eos: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """Step one row through up to n tokens, choose(i, logits (vocab,)) naming each → the tokens, and the logits (n,vocab) fp32 that
    stood before each. Ends early after a token of `eos`.
    """
    tokens, rows = [], []
    while True:
        rows.append(logits[0].float())
        tokens.append(choose(len(tokens), rows[-1]))
        if len(tokens) == n or tokens[-1] in eos:
            return tokens, torch.stack(rows)
        logits = session.feed(torch.tensor([tokens[-1:]], device=logits.device))


def greedy(_: int, logits: Tensor) -> int:
    return int(logits.argmax())


def losses(reference: Tensor, other: Tensor, text: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token: KL, whether the top tokens are the same, and the negative log-likelihood of the text under each. See `compare`."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    at = torch.tensor(text, device=p.device)[:, None]
    nll = [-x.gather(-1, at)[:, 0] for x in (p, q)]
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1), *nll


def compare(reference: Tensor, other: Tensor, text: Sequence[int], skip: int = 0) -> Fidelity:
    """reference, other (n,vocab): the logits before each of the n tokens of the text. The first `skip` count for `first` alone."""
    kl, same, *nll = losses(reference, other, text)
    wrong = (~same).nonzero().flatten().tolist()
    kl, agree = kl[skip:], same[skip:].double()
    ppl = [x[skip:].mean().exp().item() for x in nll]
    share = agree.mean().item()
    return Fidelity(len(kl), kl.mean().item(), kl.quantile(0.99).item(), share, *ppl, wrong[0] if wrong else None)


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
    """The model's own plan against `reference`, on the up to n tokens that greedy under the latter continues ids + then with.

    Without `then` the first token's odds come from the prompt's own dense attention, the same under every plan: it is left out.
    """

    def run(plan: Plan, most: int, choose: Callable[[int, Tensor], int]) -> tuple[list[int], Tensor]:
        session = llm.session(len(then) + n, chunk, plan)
        turn = llm.turn(session, [ids], then=then, limit=n, overflow=overflow)
        return follow(session, turn.logits, most, choose, eos)

    text, right = run(reference, n, greedy)
    _, mine = run(llm.plan, len(text), lambda i, _: text[i])
    return compare(right, mine, text, skip=0 if then or len(text) == 1 else 1)
