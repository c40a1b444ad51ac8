"""Whether `--policy auto` takes a plan as good as the best one, on three kinds of text.

auto sees the prompt. The plans that it tries are then compared with the full cache on the text that really follows.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import doctest
import inspect
import pdb
import tarfile
import typing
from collections.abc import Callable
from pathlib import Path

from evals.quality import mean, text_of
from evals.speed import timed
from evals.tasks import by_topic
from nanokv import parse
from nanokv.auto import candidates, choose, compare
from nanokv.llm import LLM

MODULES = (argparse, ast, difflib, doctest, inspect, pdb, tarfile, typing)  # whose source is the text of kind `code`


def code(llm: LLM, seed: int, tokens: int) -> list[int]:
    """Return token ids of the source of a module of Python's library."""
    return llm.tokenizer.encode(Path(MODULES[seed % len(MODULES)].__file__).read_text(encoding="utf-8"))[:tokens]


def dialogue(llm: LLM, seed: int, tokens: int) -> list[int]:
    """Return token ids of questions about Python, and answers from its documentation."""
    turns = [
        f"User: What should I know about {name.lower()}?\nAssistant: {' '.join(sentences[:4])}\n"
        for name, sentences in by_topic().items()
        if len(sentences) > 1
    ]
    start = seed * len(turns) // 7 % len(turns)
    return llm.tokenizer.encode("\n".join(turns[start:] + turns[:start]))[:tokens]


KINDS: dict[str, Callable[[LLM, int, int], list[int]]] = {"document": text_of, "code": code, "dialogue": dialogue}


def measure(llm: LLM, kind: str, budget: str, length: int, seeds: int, n: int, tick: Callable[[], object]) -> dict:
    """Compare all plans and auto's choice on the n tokens after prompts of `length` tokens, one prompt per seed.

    Returns for every plan, and for auto, the mean KL in nats, share of tokens where the most likely one is full's, and
    bytes; which plan auto took for each prompt; and how many times as long as a prefill its trial took.
    """
    plans = {name: parse(name).with_budget(budget) for name in candidates(budget)}
    found, taken, costs = {name: [] for name in (*plans, "auto")}, [], []
    llm.session(n).start([KINDS[kind](llm, 0, length)])  # the first matrix products of a new shape are slow
    for seed in range(seeds):
        ids, trials = KINDS[kind](llm, seed, length + n), []
        alone = timed(lambda ids=ids: llm.session(n).start([ids[:length]]), llm.device)
        work = timed(lambda ids=ids, out=trials: out.extend(choose(llm, ids[:length], budget, n)), llm.device)
        taken.append(trials[0].name)
        costs.append(work / alone)
        for trial in compare(llm, plans, ids, n, n):
            found[trial.name].append(trial)
            found["auto"] += [trial] * (trial.name == taken[-1])
        tick()
    rows = {name: {k: mean([getattr(t, k) for t in x]) for k in ("kl", "same", "bytes")} for name, x in found.items()}
    return {
        "kind": kind,
        "budget": budget,
        "length": length,
        "texts": seeds,
        "plans": rows,
        "taken": taken,
        "prefills": mean(costs),
    }
