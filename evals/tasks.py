"""Synthetic long-context tasks from prose that every CPython carries, with a fixed answer each: no download, no judge.

python -m evals.tasks --tokens 3000 --seed 1        prints one text that waits to be continued, as `make demo` uses it
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One prompt in two parts, so that it can be compressed with or without having seen the question."""

    context: str
    question: str
    opening: str  # how an answer begins: ends the prompt of a model that only continues texts
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.context}\n\n{self.question}"

    @property
    def unfinished(self) -> str:
        return f"{self.context}\n\n{self.opening}"

    def solved(self, text: str) -> bool:
        return self.answer in text


def prose() -> list[str]:
    """Sentences of the Python documentation's topics, in their order; headings, code and tables left out."""
    from pydoc_data.topics import topics

    sentences = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            lines = paragraph.splitlines()
            if any(line.startswith((" ", "*", "+", "|", "=", "-", "~", ">")) for line in lines):
                continue
            text = re.sub(r"[*`\"]|\(\)", "", " ".join(lines))
            sentences += [
                s
                for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text)
                if 40 < len(s) < 240 and s[0].isupper() and s[-1] == "."
            ]
    return list(dict.fromkeys(sentences))


def needle(seed: int, tokens: int, count: Callable[[str], int], depth: float | None = None) -> Task:
    """A seven-digit code for a city, hidden in about `tokens` tokens of varied prose (`count` measures a text).

    depth 0 … 1 says where; None draws it.
    """
    dice = random.Random(seed)
    city = dice.choice(CITIES)
    code = str(dice.randrange(10**6, 10**7))
    depth = dice.random() if depth is None else depth
    pool = prose()
    start, hay, size = dice.randrange(len(pool)), [], 0
    while size < tokens:  # a run of neighbouring sentences, so that it reads as one text
        hay.append(pool[(start + len(hay)) % len(pool)])
        size += count(" " + hay[-1])
    hay.insert(round(depth * len(hay)), f"The secret code for {city} is {code}.")
    return Task(" ".join(hay), f"What is the secret code for {city}?", f"The secret code for {city} is", code)


CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth", "Turin", "Lima", "Riga", "Kyoto", "Bergen", "Dakar")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=3000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    print(needle(args.seed, args.tokens, lambda text: len(re.findall(r"\w+|[^\w\s]", text))).unfinished, end="")


if __name__ == "__main__":
    main()
