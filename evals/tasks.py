"""Synthetic long-context tasks with fixed answers. Their prose is part of every CPython, so nothing is downloaded.

The tasks follow RULER (Hsieh et al. 2024, arXiv:2404.06654, §3), simplified for a model of 135M parameters. Every
question is the beginning of a text that the model continues, so the score depends on no chat template and no
instruction.

python -m evals.tasks --tokens 3000 --seed 1        prints one text for the model to continue; `make demo` uses it
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, written as a text that the answer continues."""

    opening: str  # starts with the separator from the text before
    # The exact continuation. Its first token (a space before digits, a quote) does not give the answer away: the
    # logits of the first token after a prompt come from dense attention and do not depend on the cache
    answer: str


@dataclass(frozen=True)
class Task:
    """A text and questions about it. Each turn has one or more questions."""

    context: str
    turns: tuple[tuple[Question, ...], ...]

    @property
    def unfinished(self) -> str:
        """The text with its first question, for the model to continue."""
        return self.context + self.turns[0][0].opening

    def solved(self, text: str) -> bool:
        """Return whether a continuation of `unfinished` contains the answer."""
        return self.turns[0][0].answer.strip() in text


def by_topic() -> dict[str, list[str]]:
    """Return the sentences of each of the topics of Python's documentation, without headings, code and tables."""
    from pydoc_data.topics import topics

    found: dict[str, list[str]] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            lines = paragraph.splitlines()
            if any(line.startswith((" ", "*", "+", "|", "=", "-", "~", ">")) for line in lines):
                continue
            text = re.sub(r"[*`\"]|\(\)", "", " ".join(lines))
            found.setdefault(name, []).extend(
                s
                for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text)
                if 40 < len(s) < 240 and s[0].isupper() and s[-1] == "."
            )
    return found


def prose() -> list[str]:
    """Return the sentences of Python's documentation topics in order."""
    return list(dict.fromkeys(s for sentences in by_topic().values() for s in sentences))


def needle(seed: int, tokens: int, count: Callable[[str], int], depth: float | None = None) -> Task:
    """Hide a seven-digit code for a city in about `tokens` tokens of prose. `count` returns the tokens of a text.

    The code lies at `depth`, 0 … 1; None draws a depth. The second turn asks for a password that is hidden elsewhere.
    """
    generator = random.Random(seed)
    city, code = generator.choice(CITIES), _number(generator, 7)
    depth = generator.random() if depth is None else depth
    sentences = _sentences(generator, tokens, count)
    name, word = generator.choice(NAMES), generator.choice(WORDS)
    facts = [f"The secret code for {city} is {code}.", f"The password of {name} is {word}."]
    text = _insert(sentences, facts, [depth, generator.random()])
    first, second = (
        Question(f"\n\nThe secret code for {city} is", f" {code}"),
        Question(f"\n\nThe password of {name} is", f" {word}"),
    )
    return Task(text, ((first,), (second,)))


def multikey(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Hide codes for four cities. The first turn asks for one, the second for another."""
    text, questions = _city_codes(seed, tokens, count)
    return Task(text, ((questions[0],), (questions[1],)))


def multiquery(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Hide codes for four cities. Each turn asks for two and names both before the first answer."""
    text, questions = _city_codes(seed, tokens, count)
    return Task(text, (_joint_turn(questions[:2]), _joint_turn(questions[2:])))


def multivalue(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Hide three codes for each of two cities. A turn asks for the codes of one city, in the order of the text."""
    generator = random.Random(seed)
    cities, depths = generator.sample(CITIES, 2), [generator.random() for _ in range(6)]
    facts = [f"One of the secret codes for {city} is {_number(generator, 5)}." for city in cities for _ in range(3)]
    text, turns = _insert(_sentences(generator, tokens, count), facts, depths), []
    for city, own in zip(cities, (facts[:3], facts[3:]), strict=True):
        opening = f"\n\nIn the order of the text, the three secret codes for {city} are"
        codes = [fact.rstrip(".").rpartition(" ")[2] for fact in sorted(own, key=text.index)]
        turns.append(tuple(Question(o, f" {code}") for o, code in zip((opening, ",", ", and"), codes, strict=True)))
    return Task(text, tuple(turns))


def variables(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Hide three chains X1 = 12345, X2 = X1 in prose. A turn follows one chain from its last variable to the value.

    Every opening names the right variable, even if the answer before was wrong. RULER's chains are longer, but a model
    of 135M parameters cannot follow a second link.
    """
    generator = random.Random(seed)
    names = [f"{letter}{generator.randrange(10)}" for letter in generator.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 6)]
    facts, depths, turns = [], [], []
    for a, b in zip(names[::2], names[1::2], strict=True):
        value = _number(generator, 5)
        facts += [f"VAR {a} = {value}.", f"VAR {b} = VAR {a}."]
        depths += sorted(generator.random() for _ in range(2))
        turns.append((Question(f"\n\nVAR {b} =", f" VAR {a}"), Question(f".\n\nVAR {a} =", f" {value}")))
    return Task(_insert(_sentences(generator, tokens, count), facts, depths), tuple(turns[:2]))


def common(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """List word pairs, half of which are the same pair. The question adds another pair; the answer is the common one.

    RULER asks for the ten most common words. A model of 135M parameters cannot count, but it can continue a list.
    """
    generator = random.Random(seed)
    often, first, second, *rare = dict.fromkeys(" ".join(generator.sample(WORDS, 2)) for _ in range(40))
    listed, size = [], 0
    while size < tokens:
        listed += [often, rare[len(listed) // 2 % len(rare)]]
        size += count(f' "{often}", "{listed[-1]}",')
    generator.shuffle(listed)
    questions = [Question(f' "{pair}",', f' "{often}') for pair in (first, second)]
    return Task(
        ", ".join(f'"{pair}"' for pair in listed) + ",",
        ((questions[0],), (Question('",' + questions[1].opening, questions[1].answer),)),
    )


def frequent(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """List words whose frequency falls with the square of their rank. The first turn asks for the most frequent one, the
    second for the next; RULER asks for three. What tells lies all over the text, so this asks whether the model can
    still count, not whether one token stayed.
    """
    generator = random.Random(seed)
    ranked = generator.sample(WORDS, len(WORDS))
    listed, size, found = [], 0, []
    while size < tokens or len({n for _, n in found}) < 3:
        listed += generator.choices(ranked, [(i + 1) ** -2 for i in range(len(ranked))])
        size += count(f' "{listed[-1]}"')
        found = Counter(listed).most_common(3)
    first, second = found[0][0], found[1][0]
    return Task(
        " ".join(f'"{word}"' for word in listed),
        (
            (Question("\n\nThe most frequent word of this list is", f' "{first}'),),
            (Question('", and the second most frequent word is', f' "{second}'),),
        ),
    )


def qa(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """Hide the versions and the exceptions of four invented functions in Python's documentation. The first turn asks in
    which version one was added, the second which exception another one raises.
    """
    generator = random.Random(seed)
    words, errors = generator.sample(WORDS, 8), generator.sample(ERRORS, 4)
    names = [f"{a}_{b}" for a, b in zip(words[::2], words[1::2], strict=True)]
    versions = [f"{generator.randrange(2, 10)}.{_number(generator, 2)}" for _ in names]
    facts = [
        f"The function {name}() was added in version {version} and may raise {error}."
        for name, version, error in zip(names, versions, errors, strict=True)
    ]
    first = Question(
        f"\n\nQuestion: In which version was the function {names[0]}() added?\nAnswer: It was added in version",
        f" {versions[0]}",
    )
    second = Question(
        f"\n\nQuestion: Which exception may the function {names[1]}() raise?\nAnswer: It may raise", f" {errors[1]}"
    )
    text = _insert(_sentences(generator, tokens, count), facts, [generator.random() for _ in facts])
    return Task(text, ((first,), (second,)))


def keyvalue(seed: int, tokens: int, count: Callable[[str], int]) -> Task:
    """List lines of keys and values. The first turn asks for one value, the second for another."""
    generator = random.Random(seed)
    keys = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    generator.shuffle(keys)
    rows, size = [], 0
    while size < tokens:
        rows.append((keys.pop(), _number(generator, 4)))
        size += count('"{}": "{}",\n'.format(*rows[-1]))
    questions = [Question(f'\n\n"{key}":', f' "{value}') for key, value in generator.sample(rows, 2)]
    return Task("\n".join(f'"{k}": "{v}",' for k, v in rows), tuple((a,) for a in questions))


# the last three are beyond the smallest models, and run if they are asked for
TASKS: dict[str, Callable[..., Task]] = {
    "needle": needle,
    "multikey": multikey,
    "multiquery": multiquery,
    "variables": variables,
    "common": common,
    "keyvalue": keyvalue,
    "multivalue": multivalue,
    "frequent": frequent,
    "qa": qa,
}
STANDARD = tuple(TASKS)[:6]


def _sentences(generator: random.Random, tokens: int, count: Callable[[str], int]) -> list[str]:
    """Return about `tokens` tokens of consecutive sentences, so that they read as one text."""
    pool = prose()
    start, sentences, size = generator.randrange(len(pool)), [], 0
    while size < tokens:
        sentences.append(pool[(start + len(sentences)) % len(pool)])
        size += count(" " + sentences[-1])
    return sentences


def _insert(sentences: list[str], facts: list[str], depths: list[float]) -> str:
    """Insert each fact between the sentences at its depth, 0 … 1, and return the text."""
    for depth, fact in sorted(
        zip(depths, facts, strict=True), reverse=True
    ):  # the last first, which moves a depth only a little
        sentences.insert(round(depth * len(sentences)), fact)
    return " ".join(sentences)


def _city_codes(seed: int, tokens: int, count: Callable[[str], int]) -> tuple[str, list[Question]]:
    """Hide the codes of four cities in prose. Returns the text and the questions."""
    generator = random.Random(seed)
    cities = generator.sample(CITIES, 4)
    questions = [Question(f"\n\nThe secret code for {city} is", f" {_number(generator, 5)}") for city in cities]
    facts = [f"{a.opening.strip()}{a.answer}." for a in questions]
    return _insert(_sentences(generator, tokens, count), facts, [generator.random() for _ in facts]), questions


def _joint_turn(questions: list[Question]) -> tuple[Question, ...]:
    """Combine questions into one turn: the first opening names all cities, and the answers follow one by one."""
    first, *rest = questions
    cities = " and ".join(a.opening.partition(" for ")[2].removesuffix(" is") for a in questions)
    known = Question(f"\n\nThe secret codes for {cities} are needed.{first.opening}", first.answer)
    return (known, *(Question("." + a.opening, a.answer) for a in rest))


def _number(generator: random.Random, digits: int) -> str:
    """Draw a number with this many digits."""
    return str(generator.randrange(10 ** (digits - 1), 10**digits))


CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth", "Turin", "Lima", "Riga", "Kyoto", "Bergen", "Dakar")
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon")
ERRORS = ("LookupError", "BufferError", "TimeoutError", "EOFError", "ReferenceError", "ConnectionError", "UnicodeError")
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
    p.add_argument("--answer", action="store_true", help="print the answer instead of the text")
    args = p.parse_args()
    task = needle(args.seed, args.tokens, lambda text: len(re.findall(r"\w+|[^\w\s]", text)))
    print(task.turns[0][0].answer.strip() if args.answer else task.unfinished, end="")


if __name__ == "__main__":
    main()
