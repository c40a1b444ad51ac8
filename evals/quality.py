"""Score plans on the synthetic tasks, and measure their fidelity to the full cache on plain text.

A question is solved if greedy decoding would write its answer token for token. The opening of the question is fed at
once and the right answer token by token; each answer token must be the most likely one at its position. What a model
would write before or after the answer does not count. Later questions of a task follow the right answers to the
earlier ones.

aware: the prompt includes the first question's opening when it is compressed, as in the SnapKV paper. The first token
of that answer comes from the dense prompt, so answers start with a token that is easy to predict (see `Question`).
agnostic: only the text is compressed and every question follows. turn 2: another question on the same cache.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evals.tasks import TASKS, Task, prose
from nanokv import auto, parse
from nanokv.cache.plan import Plan
from nanokv.engine import Session
from nanokv.inspect.dense import begin
from nanokv.inspect.fidelity import follow, greedy, losses
from nanokv.llm import LLM
from nanokv.policies import POLICIES
from nanokv.stores import STORES
from nanokv.text.tokenizer import Tokenizer

PROTOCOLS = ("aware", "agnostic")
DEPTHS = 5  # seed i places its needle at depth (i % 5) / 4 of the text
# The full cache must reach these scores, or the scores of other plans mean nothing. They are about half of what it
# solves on 20 texts of 1,000 tokens. With a wrong tokenizer, template or weight it solves almost nothing
FLOORS = {
    "smollm2-135m": {
        "needle": 0.5,
        "multikey": 0.35,
        "multiquery": 0.25,
        "variables": 0.3,
        "common": 0.25,
        "keyvalue": 0.25,
    }
}


@dataclass(frozen=True)
class Item:
    """One text of one task. An interrupted run keeps the results of finished items."""

    task: str
    length: int
    seed: int
    at: float | None = None  # depth of the needle, 0 … 1; None: it depends on the seed

    @property
    def depth(self) -> float | None:
        """The depth of the needle, 0 … 1. None for other tasks."""
        if self.task != "needle":
            return None
        return self.seed % DEPTHS / (DEPTHS - 1) if self.at is None else self.at

    def make(self, tokenizer: Tokenizer) -> Task:
        """Build the text and its questions. The tokenizer measures its length."""

        def count(text: str) -> int:
            return len(tokenizer.encode(text, special=False))

        where = {} if self.depth is None else {"depth": self.depth}
        return TASKS[self.task](self.seed, self.length, count, **where)


@dataclass(frozen=True)
class Auto:
    """`--policy auto` under a budget, in the place of a plan. Each prompt gets a plan of its own."""

    budget: str

    def __str__(self) -> str:
        return f"auto under {self.budget}"


def resolved(llm: LLM, plans: Sequence[Plan | Auto], ids: Sequence[int], room: int) -> list[Plan]:
    """Return the plans with which the prompt `ids` is served."""
    return [auto.choose(llm, ids, p.budget, room)[0].plan if isinstance(p, Auto) else p for p in plans]


@dataclass(frozen=True)
class Answer:
    """The tokens of one turn, which is fed after the prompt."""

    ids: list[int]
    answers: list[tuple[int, int]]  # (start, end) of each answer in `ids`


def prompt_and_turns(task: Task, tokenizer: Tokenizer, protocol: str) -> tuple[list[int], list[Answer]]:
    """Encode a task: the ids of the prompt, and the turns that follow on its cache."""
    aware = protocol == "aware"
    prompt, turns = tokenizer.encode(task.unfinished if aware else task.context), []
    for t, questions in enumerate(task.turns):
        ids, answers = [], []
        for i, question in enumerate(questions):
            if not (aware and t == i == 0):
                ids += tokenizer.encode_more(question.opening)
            answer = tokenizer.encode_more(question.answer)
            answers.append((len(ids), len(ids) + len(answer)))
            ids += answer
        turns.append(Answer(ids, answers))
    return prompt, turns


def solved(before: torch.Tensor, after: torch.Tensor, turn: Answer) -> float:
    """Return the share of a turn's answers that greedy decoding would write.

    before (1,vocab) are the logits before the turn, after (T,vocab) those after each of its tokens.
    """
    best = torch.cat((before, after)).argmax(-1).tolist()
    return sum(best[a:b] == turn.ids[a:b] for a, b in turn.answers) / len(turn.answers)


def feed_turn(session: Session, turn: Answer) -> torch.Tensor:
    """Feed a turn as in real use: each question at once, each answer token by token. Returns the logits (T,vocab).

    Some stores read many tokens at once differently from single ones.
    """
    pieces, at = [], 0
    for a, b in turn.answers:
        pieces += [turn.ids[at:a], *([t] for t in turn.ids[a:b])]
        at = b
    fed = [session.feed(torch.tensor([x], device=session.pos.device), every_logit=True)[0] for x in pieces if x]
    return torch.cat(fed)


def servable(
    llm: LLM, plans: Sequence[Plan], length: int, room: int, rows: int = 1
) -> tuple[list[int], dict[int, str]]:
    """Return the indices of the plans that can serve a prompt of this length, and the reasons of those that cannot.

    ValueError if the model's context is too short.
    """
    top = llm.config.max_position_embeddings
    if length + room > top:
        raise ValueError(
            f"{length} tokens of prompt and {room} after it are more than the {top} of this model's context; give --lengths"
        )
    good, refused = [], {}
    for i, plan in enumerate(plans):
        try:
            plan.fit(llm.config, llm.models.new_context().dtype, length, room, rows)
            llm.check_passes(Session(llm.models, plan, room), [[0] * length], rows)
            good.append(i)
        except ValueError as e:
            refused[i] = str(e)
    return good, refused


def judge(llm: LLM, given: Sequence[Plan | Auto], item: Item) -> list[dict]:
    """Score every plan under both protocols on one text, with one prefill each. A refused plan gets a reason, and auto
    the plan that it took.
    """
    task, records = item.make(llm.tokenizer), []
    for protocol in PROTOCOLS:
        ids, turns = prompt_and_turns(task, llm.tokenizer, protocol)
        room = sum(len(t.ids) for t in turns)
        plans = resolved(llm, given, ids, room)
        good, refused = servable(llm, plans, len(ids), room)
        records += [{"plan": i, "protocol": protocol, "refused": reason} for i, reason in refused.items()]
        for i, start in begin(llm, [plans[i] for i in good], ids, room):
            session, before = start()
            report, scores = session.report(), []
            for turn in turns:
                after = feed_turn(session, turn)
                scores.append(solved(before, after, turn))
                before = after[-1:]
            report = report or session.report()  # a policy that waits has no report before the first token
            found = {k: getattr(report, k) for k in ("bytes", "full_bytes", "host_bytes")}
            if isinstance(given[good[i]], Auto):
                found["took"] = str(plans[good[i]])
            records.append({"plan": good[i], "protocol": protocol, "scores": scores, **found})
    return records


def text_of(llm: LLM, seed: int, tokens: int) -> list[int]:
    """Return token ids of consecutive sentences of Python's documentation. The seed chooses the first sentence."""
    pool = prose()
    start, ids = seed * len(pool) // 7 % len(pool), []
    while len(ids) < tokens:
        ids = llm.tokenizer.encode(" ".join(pool[start:]))
        pool = pool + pool
    return ids[:tokens]


def fidelity(llm: LLM, given: Sequence[Plan | Auto], seed: int, length: int, n: int) -> list[dict]:
    """Compare every plan with the first one, token by token, on n tokens that follow a prompt of prose.

    The prompt has `length` tokens. One more token between it and the n tokens is skipped, because its logits come from
    the dense prompt. `first` is where greedy decoding departs from the text that it writes under the first plan.
    """
    ids = text_of(llm, seed, length + n + 1)
    ids, text = ids[:length], ids[length:]
    plans = resolved(llm, given, ids, n + 1)
    good, refused = servable(llm, plans, length, n + 1)
    starts = dict(begin(llm, [plans[i] for i in good], ids, n + 1))

    def logits_on(i: int, tokens: Sequence[int]) -> torch.Tensor:
        session, before = starts[i]()
        return follow(session, before, len(tokens), lambda at, _: tokens[at])[1]

    session, before = starts[0]()
    written, written_logits = follow(session, before, n + 1, greedy)
    reference = logits_on(0, text)
    records = [{"plan": i, "refused": reason} for i, reason in refused.items()]
    for i, plan in enumerate(good):
        kl, same, *nll = (x[1:].tolist() for x in losses(reference, reference if i == 0 else logits_on(i, text), text))
        own = written_logits if i == 0 else logits_on(i, written)
        agrees = losses(written_logits, own, written)[1].tolist()
        first = agrees.index(False) if False in agrees else None
        records.append({"plan": plan, "kl": kl, "same": same, "nll": nll, "first": first})
    return records


def merged(names: Sequence[str], found: dict[tuple[int, int], list[dict]]) -> list[dict]:
    """Combine the fidelity records of {(length, seed): records} into one row per plan and length.

    The means are over the tokens of all texts. `first` is the mean over the texts that depart.
    """
    out = []
    for p, name in enumerate(names):
        for length in dict.fromkeys(n for n, _ in found):
            selected = [r for (n, _), records in found.items() if n == length for r in records if r["plan"] == p]
            row = {"plan": name, "length": length}
            if refused := [r["refused"] for r in selected if "refused" in r]:
                out.append({**row, "refused": refused[0]})
                continue
            kl = torch.tensor([x for r in selected for x in r["kl"]], dtype=torch.float64)
            ppl = [math.exp(mean([x for r in selected for x in r["nll"][i]])) for i in (0, 1)]
            departed = [r["first"] for r in selected if r["first"] is not None]
            row |= {"tokens": len(kl), "kl_mean": kl.mean().item(), "kl_p99": kl.quantile(0.99).item()}
            row |= {"top1": mean([x for r in selected for x in r["same"]]), "ppl_full": ppl[0], "ppl": ppl[1]}
            out.append(
                row | {"first": mean(departed) if departed else None, "departed": len(departed), "texts": len(selected)}
            )
    return out


def named(texts: Sequence[str], budgets: Sequence[str]) -> dict[str, Plan | Auto]:
    """Parse plans and give them short names. A plan that takes a budget and names none is listed once per budget, and so
    is auto.
    """
    plans = {}
    for text in texts:
        if text == "auto":
            plans |= {f"auto {b}": Auto(b) for b in budgets}
            continue
        plan = parse(text)
        if "budget=" in text or not _takes_budget(plan):
            plans[text] = plan
        else:
            plans |= {f"{text} {b}": plan.with_budget(b) for b in budgets}
    return plans


def _takes_budget(plan: Plan) -> bool:
    try:
        return bool(plan.with_budget("50%"))
    except ValueError:
        return False


def registered() -> list[str]:
    """Name every policy, full first, and every store that supports the full cache. Aliases of a store count once."""
    stores = {
        spec: name for name, spec in STORES.items() if name != "dense" and not spec.incompatible_policy(Plan().policy)
    }
    return [*POLICIES, *(f"full+{name}" for name in stores.values())]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(model: str, names: Sequence[str], records: dict[Item, list[dict]], floor: float | None) -> list[dict]:
    """Return, per task and length, the full cache's score and floor, and every plan's mean scores and bytes.

    `floor` replaces the floors of FLOORS.
    """
    out = []
    for task, length in dict.fromkeys((i.task, i.length) for i in records):
        texts = [r for i, r in records.items() if (i.task, i.length) == (task, length)]
        minimum = FLOORS.get(model, {}).get(task, 0.5) if floor is None else floor
        table = {}
        for p, name in enumerate(names):
            selected = {q: [r for t in texts for r in t if (r["plan"], r["protocol"]) == (p, q)] for q in PROTOCOLS}
            first = {q: [r for t in texts for r in t if (r["plan"], r["protocol"]) == (0, q)] for q in PROTOCOLS}
            table[name] = {q: _means(selected[q], first[q]) for q in PROTOCOLS}
            if refused := next((x["refused"] for x in table[name].values() if "refused" in x), None):
                table[name] = {q: {"refused": refused} for q in PROTOCOLS}
        full = mean([table[names[0]][q]["score"] for q in PROTOCOLS])
        head = {"task": task, "length": length, "texts": len(texts), "full": full, "floor": minimum}
        if full < minimum:
            head["refused"] = (
                f"the full cache itself solves {full:.0%} of {task} at {length} tokens, below its floor of "
                f"{minimum:.0%}: a wrong tokenizer, template or weights, or a task beyond this model; "
                "scores of policies would mean nothing"
            )
            table = {names[0]: table[names[0]]}
        out.append({**head, "plans": table})
    return out


def _means(selected: list[dict], full: list[dict]) -> dict:
    """Average the records of one plan. of_full is, per turn, [texts that both solve, texts that full solves]."""
    refused = [r["refused"] for r in selected if "refused" in r]
    if refused:
        return {"refused": refused[0]}
    found = {"score": mean([r["scores"][0] for r in selected]), "turn2": mean([r["scores"][1] for r in selected])}
    found |= {k: mean([r.get(k, 0) for r in selected]) for k in ("bytes", "full_bytes", "host_bytes")}
    if took := [r["took"] for r in selected if "took" in r]:
        found["took"] = dict(Counter(took))
    both = [[m["scores"][i] == 1 for m, f in zip(selected, full, strict=True) if f["scores"][i] == 1] for i in (0, 1)]
    return found | {"of_full": [[sum(x), len(x)] for x in both]}


def grid(
    names: Sequence[str], records: dict[Item, list[dict]], parts: Sequence[dict]
) -> dict[str, dict[str, list[list]]]:
    """Return needle scores, plan → protocol → [length, depth, score], for the lengths where full reached its floor."""
    good = {(p["length"], name) for p in parts if p["task"] == "needle" for name in p["plans"] if "refused" not in p}
    cells: dict = {}
    for item, found in records.items():
        for r in found:
            name = names[r["plan"]]
            if item.depth is not None and (item.length, name) in good and "scores" in r:
                cells.setdefault((name, r["protocol"], item.length, item.depth), []).append(r["scores"][0])
    out: dict = {}
    for (name, protocol, length, depth), scores in sorted(cells.items(), key=lambda c: c[0][2:]):
        out.setdefault(name, {q: [] for q in PROTOCOLS})[protocol].append([length, depth, mean(scores)])
    return out
