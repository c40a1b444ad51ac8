"""How far a compressed cache strays from another one on the same text: KL divergence, agreement, perplexity, first difference.

Accuracy on tasks can hide damage that these show at once. Both caches are stepped through the same tokens one at a time, as
decode does, so that what a policy drops on the way counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.engine import Session
from nanokv.llm import LLM
from nanokv.plan import Plan


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


def compare(reference: Tensor, other: Tensor, text: Sequence[int]) -> Fidelity:
    """reference, other (n,vocab): the logits before each of the n tokens of the text."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    at = torch.tensor(text, device=p.device)[:, None]
    ppl = [(-x.gather(-1, at).mean()).exp().item() for x in (p, q)]
    wrong = (~same).nonzero().flatten().tolist()
    return Fidelity(
        len(text),
        kl.mean().item(),
        kl.quantile(0.99).item(),
        same.double().mean().item(),
        *ppl,
        wrong[0] if wrong else None,
    )


def against(
    llm: LLM, reference: Plan, ids: Sequence[int], then: Sequence[int], n: int, eos: Sequence[int], overflow: bool
) -> Fidelity:
    """The model's own plan against `reference`, on the up to n tokens that greedy under the latter continues ids + then with."""

    def run(plan: Plan, n: int, choose: Callable[[int, Tensor], int]) -> tuple[list[int], Tensor]:
        session = llm.session(len(then) + n, plan=plan)
        turn = llm.turn(session, [ids], then=then, limit=n, overflow=overflow)
        return follow(session, turn.logits, n, choose, eos)

    text, right = run(reference, n, greedy)
    _, mine = run(llm.plan, len(text), lambda i, _: text[i])
    return compare(right, mine, text)
