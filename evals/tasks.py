"""Synthetic long-context tasks from prose that every CPython carries, with a fixed answer each: no download, no judge.

After RULER (Hsieh et al. 2024, arXiv:2404.06654, §3), in forms that a model of 135M parameters can do: every question is a text that
waits to be continued, so neither a chat template nor an instruction decides the score.

python -m evals.tasks --tokens 3000 --seed 1        prints one text that waits to be continued, as `make demo` uses it
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """A question as the beginning of its answer."""

    opening: str  # with what separates it from the text before
    # as it must follow. It begins with a token that says nothing (a space before digits, a quote): the first token after a prompt comes
    # from the prompt's own dense attention, whatever the cache keeps
    answer: str


@dataclass(frozen=True)
class Task:
    """A text, and questions about it: the first turn's, and what is asked later about the same text."""

    context: str
    turns: tuple[tuple[Ask, ...], ...]

    @property
    def unfinished(self) -> str:
        """The text with its first question, waiting to be continued."""
        return self.context + self.turns[0][0].opening

    def solved(self, text: str) -> bool:
        """Whether a continuation of `unfinished` names the answer."""
        return self.turns[0][0].answer.strip() in text


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

    depth 0 … 1 says where; None draws it. The second turn asks for something else that the text says elsewhere.
    """
    dice = random.Random(seed)
    city, code = dice.choice(CITIES), _code(dice, 7)
    depth = dice.random() if depth is None else depth
    hay = _hay(dice, tokens, count)
    name, word = dice.choice(NAMES), dice.choice(WORDS)
    facts = [f"The secret code for {city} is {code}.", f"The password of {name} is {word}."]
    text = _hide(hay, facts, [depth, dice.random()])
    first, second = (
        Ask(f"\n\nThe secret code for {city} is", f" {code}"),
        Ask(f"\n\nThe password of {name} is", f" {word}"),
    )
    return Task(text, ((first,), (second,)))


def multikey(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Codes for four cities, of which one is asked for, then another."""
    text, asks = _codes(seed, tokens, count)
    return Task(text, ((asks[0],), (asks[1],)))


def multiquery(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Codes for four cities, of which two are asked for, both named before the first answer; then the other two."""
    text, asks = _codes(seed, tokens, count)
    return Task(text, (_together(asks[:2]), _together(asks[2:])))


def variables(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Three chains X1 = 12345, X2 = X1 between sentences; one is walked back from its last name to the value, then another.

    Each opening names the right variable, whatever was answered before. RULER's chains are longer; a second link back is beyond a
    model of 135M parameters.
    """
    dice = random.Random(seed)
    names = [f"{letter}{dice.randrange(10)}" for letter in dice.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 6)]
    facts, depths, turns = [], [], []
    for a, b in zip(names[::2], names[1::2], strict=True):
        value = _code(dice, 5)
        facts += [f"VAR {a} = {value}.", f"VAR {b} = VAR {a}."]
        depths += sorted(dice.random() for _ in range(2))
        turns.append((Ask(f"\n\nVAR {b} =", f" VAR {a}"), Ask(f".\n\nVAR {a} =", f" {value}")))
    return Task(_hide(_hay(dice, tokens, count), facts, depths), tuple(turns[:2]))


def common(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """A list of word pairs of which half are the same one; the list goes on with another pair, and the common one is what comes next.

    RULER asks for the ten most common words; a model of 135M parameters cannot count, but it goes on.
    """
    dice = random.Random(seed)
    often, first, second, *rare = dict.fromkeys(" ".join(dice.sample(WORDS, 2)) for _ in range(40))
    listed, size = [], 0
    while size < tokens:
        listed += [often, rare[len(listed) // 2 % len(rare)]]
        size += count(f' "{often}", "{listed[-1]}",')
    dice.shuffle(listed)
    asks = [Ask(f' "{pair}",', f' "{often}') for pair in (first, second)]
    return Task(
        ", ".join(f'"{pair}"' for pair in listed) + ",", ((asks[0],), (Ask('",' + asks[1].opening, asks[1].answer),))
    )


def keyvalue(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Nothing but lines of keys and values; one value is asked for, then another."""
    dice = random.Random(seed)
    keys = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    dice.shuffle(keys)
    rows, size = [], 0
    while size < tokens:
        rows.append((keys.pop(), _code(dice, 4)))
        size += count('"{}": "{}",\n'.format(*rows[-1]))
    asks = [Ask(f'\n\n"{key}":', f' "{value}') for key, value in dice.sample(rows, 2)]
    return Task("\n".join(f'"{k}": "{v}",' for k, v in rows), tuple((a,) for a in asks))


TASKS: dict[str, Callable[..., Task]] = {
    "needle": needle,
    "multikey": multikey,
    "multiquery": multiquery,
    "variables": variables,
    "common": common,
    "keyvalue": keyvalue,
}


def _hay(dice: random.Random, tokens: int, count: Callable[[str], int]) -> list[str]:
    """About `tokens` tokens of neighbouring sentences, so that they read as one text."""
    pool = prose()
    start, hay, size = dice.randrange(len(pool)), [], 0
    while size < tokens:
        hay.append(pool[(start + len(hay)) % len(pool)])
        size += count(" " + hay[-1])
    return hay


def _hide(hay: list[str], facts: list[str], depths: list[float]) -> str:
    """The facts between the sentences, each at its depth 0 … 1."""
    for depth, fact in sorted(zip(depths, facts, strict=True), reverse=True):  # from the end, so that depths stay true
        hay.insert(round(depth * len(hay)), fact)
    return " ".join(hay)


def _codes(seed: int, tokens: int, count: Callable[[str], int]) -> tuple[str, list[Ask]]:
    """Four cities' codes in prose, and the questions for them."""
    dice = random.Random(seed)
    cities = dice.sample(CITIES, 4)
    asks = [Ask(f"\n\nThe secret code for {city} is", f" {_code(dice, 5)}") for city in cities]
    facts = [f"{a.opening.strip()}{a.answer}." for a in asks]
    return _hide(_hay(dice, tokens, count), facts, [dice.random() for _ in facts]), asks


def _together(asks: list[Ask]) -> tuple[Ask, ...]:
    """Questions that are all known from the start, answered one after the other."""
    first, *rest = asks
    cities = " and ".join(a.opening.partition(" for ")[2].removesuffix(" is") for a in asks)
    known = Ask(f"\n\nThe secret codes for {cities} are needed.{first.opening}", first.answer)
    return (known, *(Ask("." + a.opening, a.answer) for a in rest))


def _code(dice: random.Random, digits: int) -> str:
    return str(dice.randrange(10 ** (digits - 1), 10**digits))


CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth", "Turin", "Lima", "Riga", "Kyoto", "Bergen", "Dakar")
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon")
WORDS = [
    "apple",
    "river",
    "candle",
    "monkey",
    "garden",
    "silver",
    "window",
    "planet",
    "button",
    "coffee",
    "jacket",
    "island",
    "rocket",
    "pepper",
    "mirror",
    "ladder",
    "forest",
    "basket",
    "dragon",
    "engine",
    "feather",
    "guitar",
    "hammer",
    "kettle",
    "lemon",
    "magnet",
    "needle",
    "orange",
    "pencil",
    "rabbit",
    "saddle",
    "tunnel",
    "velvet",
    "wallet",
    "yellow",
    "zipper",
    "anchor",
    "bottle",
    "castle",
    "desert",
]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=3000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    print(needle(args.seed, args.tokens, lambda text: len(re.findall(r"\w+|[^\w\s]", text))).unfinished, end="")


if __name__ == "__main__":
    main()
