"""Speculative decoding: whether the text stays the same, how often drafts are right, and what they gain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from evals.quality import text_of
from nanokv.llm import LLM

KINDS = ("repetitive", "open")


def prompt(llm: LLM, kind: str, seed: int, n: int) -> list[int]:
    """repetitive: prose of n tokens and its first quarter again, which a model goes on copying. open: prose alone."""
    ids = text_of(llm, seed, n)
    return [*ids, *ids[: n // 4]] if kind == "repetitive" else ids


def measure(
    llm: LLM,
    drafts: Sequence[str],
    kind: str,
    seeds: int,
    prompt_len: int,
    new: int,
    at_most: int,
    tick: Callable[[int], object] = lambda _: None,
) -> list[dict]:
    """Greedy texts of `new` tokens after `seeds` prompts, without a draft and then with each, under the full cache.

    Every draft has a row: how many texts are token for token the same, how many tokens a pass gave, and tokens/s with
    and without. The time to prefill is not in the rates.
    """
    found = [
        {"draft": d, "kind": kind, "texts": seeds, "same": 0, "passes": 0, "drafted": 0, "accepted": 0} for d in drafts
    ]
    seconds, tokens = [0.0] * (1 + len(drafts)), [0] * (1 + len(drafts))
    for seed in range(seeds):
        ids, right = prompt(llm, kind, seed, prompt_len), None
        for i, draft in enumerate((None, *drafts)):
            speculation = llm.speculation(draft, at_most) if draft else None
            answer = llm.answer(
                llm.session(new), [ids], limit=new, ignore_eos=True, overflow=True, speculation=speculation
            )
            t0 = time.perf_counter()
            for _ in answer:
                pass
            seconds[i] += time.perf_counter() - t0
            tokens[i] += len(answer.ids[0])
            tick(1)
            right = right or answer.ids[0]
            if speculation:
                row = found[i - 1]
                row["same"] += answer.ids[0] == right
                for name in ("passes", "drafted", "accepted"):
                    row[name] += getattr(speculation, name)
    for row, s, n in zip(found, seconds[1:], tokens[1:], strict=True):
        row |= {"new_tokens": new, "at_most": at_most, "plain_tok_s": tokens[0] / seconds[0], "tok_s": n / s}
    return found
