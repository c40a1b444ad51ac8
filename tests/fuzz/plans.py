"""Random plans, drawn from the registries, and the ways in which one conversation can go through them.

A conversation is a list of prompts, one per row, the tokens that follow each, and how many of these come at once. What
comes out must not depend on what lies beside a row, on chunks of the prompt, on when room is reserved, or on a file in
between.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from tiny import text
from torch import Tensor

from nanokv import parse, save
from nanokv.cache.plan import Plan, canonical, configure
from nanokv.engine import Session
from nanokv.llm import LLM
from nanokv.policies import POLICIES
from nanokv.stores import STORES

# what an option is drawn from; one that is not named here is drawn by the type of its default
CANDIDATES = {
    "budget": ["6", "12", "20", "33", "25%", "40%", "70%"],
    "window": ["1", "2", "4", "7"],
    "kernel": ["1", "3", "5"],
    "pool": ["max", "avg"],
    "group": ["mean", "max"],
    "layers": ["flat", "pyramid", "compete"],
    "heads": ["flat", "ada"],
    "select": ["token", "chunk"],
    "every": ["0", "3", "5", "8"],
    "merge": ["none", "nearest"],
    "refit": ["none", "lsq"],
    "chunk": ["2", "4", "6"],
    "sink": ["0", "1", "2", "4"],
    "recent": ["3", "8", "16"],
    "positions": ["absolute", "cache"],
    "variant": ["prefill", "decode", "light"],
    "threshold": ["0", "0.3", "0.45", "0.6"],
    "full": ["0", "1", "50%"],
    "mass": ["0.3", "0.9"],
    "mix": ["0.07", "0.5", "1"],
    "similar": ["0", "0.5"],
    "far": ["1", "100", "65536"],
    "piece": ["7", "30", "2048"],
    "lag": ["4", "7"],
    "rings": ["2", "3"],
    "tau": ["1.0", "1.5"],
    "future": ["8", "32"],
    "salient": ["0.2", "0.6"],
    "gates": ["none"],
    "residual": ["0", "3", "8"],
    "pin": ["0", "1", "3"],
    "format": ["e4m3", "e5m2"],
    "block": ["4", "8", "16"],
    "high": ["16", "8", "4"],
    "low": ["2", "3"],
    "context": ["0", "3", "24", "40"],
    "channels": ["2", "4", "8"],
    "epsilon": ["0.01", "0.1", "1"],
    "start": ["0", "0.5"],
    "retain": ["0", "0.2"],
    "rank": ["1", "4", "12", "none"],
    "outliers": ["0", "1", "2"],
    "local": ["0", "1", "2"],
    "grow": ["0", "6", "9"],
    "values": ["host", "device", "int4"],
    "n": ["4", "16"],
}
BY_STORE = {
    "k": ["8", "4", "2"],
    "v": ["8", "4", "2"],
    "group": ["2", "4", "8"],
    "budget": ["8", "16", "24", "40"],
    "bits": ["2", "4.5", "8"],
    "layers": ["k8v2", "k2v4-k8v8", "k4v8x2-k2v2"],
}
DEFAULT_MATTERS = (
    "layers",
    "heads",
    "select",
    "demote",
    "variant",
    "every",
    "merge",
    "refit",
)  # an option that is left out is often meant
STEPS = 24
LENGTHS = (1, 2, 5, 13, 24, 37, 45, 52, 60, 64)  # tokens of a prompt
SHARES = ({}, {}, {}, {1: 0}, {2: 1}, {2: 0})


@dataclass(frozen=True)
class Case:
    model: str
    plan: Plan
    prompts: list[list[int]]
    more: list[list[int]]  # STEPS tokens per row
    pieces: list[int]  # how many of them come at once
    chunk: int
    save_after: int  # pieces
    room: int  # tokens reserved at a time, where room comes late


def draw(dice: random.Random, models: dict[str, LLM]) -> Case:
    """A plan that the model can run, and a conversation for it."""
    model = dice.choice(sorted(models))
    config = models[model].config
    store = dice.choice(sorted(STORES))  # chosen first: few policies go with the stores that hold chunks
    while True:
        try:
            plan = replace(parse(_plan(dice, store)), share=dice.choice(SHARES))
            lengths = [dice.choice(LENGTHS) for _ in range(dice.choice((2, 3)))]
            for n in lengths:
                plan.fit(config, torch.float32, n, STEPS, len(lengths))
            break
        except ValueError:  # refused with a sentence
            continue
    pieces = []
    while sum(pieces) < STEPS:
        pieces.append(min(dice.choice((1, 1, 1, 1, 3, 7)), STEPS - sum(pieces)))
    seed = dice.randrange(10**6)
    prompts, more = (
        [text(n, seed + 10 * i + k) for i, n in enumerate(sizes)]
        for k, sizes in enumerate((lengths, [STEPS] * len(lengths)))
    )
    return Case(
        model,
        plan,
        prompts,
        more,
        pieces,
        dice.choice((1, 4, 9, 16)),
        dice.randrange(len(pieces)),
        dice.choice((1, 6, 8)),
    )


def _plan(dice: random.Random, store: str) -> str:
    policy = dice.choice(sorted(POLICIES))
    return _part(dice, policy, POLICIES[policy], {}) + "+" + _part(dice, store, STORES[store], BY_STORE)


def _part(dice: random.Random, name: str, part: object, special: dict[str, list[str]]) -> str:
    given = {}
    for f in fields(part):
        default = getattr(part, f.name)
        if dice.random() < (0.7 if f.name in DEFAULT_MATTERS else 0.2):
            continue
        if f.name in special:
            values = special[f.name]
        elif f.name in CANDIDATES:
            values = CANDIDATES[f.name]
        elif isinstance(default, bool):
            values = ["true", "false"]
        elif isinstance(default, int):
            values = ["1", "2", "5", "9"]
        elif isinstance(default, float):
            values = ["0.25", "0.5", "0.9"]
        else:
            continue
        given[f.name] = dice.choice(values)
    return canonical(name, configure(name, part, given))


# ---- one conversation ------------------------------------------------------------------------------------------------


def talk(
    llm: LLM,
    case: Case,
    rows: list[int],
    chunk: int | None = None,
    room: int | None = None,
    after: Callable[[Session, int], Session] = lambda session, i: session,
) -> Tensor:
    """Feed the rows → the logits after every token (rows, 1 + STEPS, vocab). room: how many tokens are reserved at a time; None: for all.
    after(session, i) may put another session in place after the i-th piece.
    """
    session = llm.session(room or STEPS, chunk, case.plan)
    found = [session.start([case.prompts[b] for b in rows])[:, None]]
    tokens, a = torch.tensor([case.more[b] for b in rows]), 0
    for i, n in enumerate(case.pieces):
        if room is not None:
            session.reserve(max(room, n))
        found.append(session.feed(tokens[:, a : a + n], every_logit=True))
        a += n
        session = after(session, i)
    return torch.cat(found, 1)


def through_a_file(llm: LLM, case: Case, file: Path) -> Callable[[Session, int], Session]:
    """Save after one piece, where the plan can be saved then, and go on with what was loaded."""

    def swap(session: Session, i: int) -> Session:
        if i != case.save_after:
            return session
        try:
            save.save(llm, session, file)
        except ValueError:  # a policy that has not decided yet, or is between two rescores
            return session
        return save.restore(llm, file, STEPS)

    return swap
