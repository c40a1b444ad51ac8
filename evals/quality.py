"""Scores of plans on the synthetic tasks, and their fidelity to the full cache on plain text.

A question counts as solved if greedy decoding, after its opening, would write the answer token for token: the opening is fed as one turn,
the right answer token by token behind it, and every token of the answer must be the most likely one where it stands. What a model says
around an answer, and when it stops, decides nothing. Later questions of a task follow the right answers to the earlier ones.

aware: the prompt ends with the first question's opening when it is compressed (the SnapKV paper's way); the first token of an answer,
which comes from the dense prompt itself, says nothing (see `Ask`). agnostic: the text alone is
compressed, every question comes after. A turn-2 question is another one on the same cache, compressed for the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evals.dense import begin
from evals.tasks import TASKS, Task, prose
from nanokv import parse
from nanokv.cache.plan import Plan
from nanokv.engine import Session
from nanokv.inspect.fidelity import follow, greedy, losses
from nanokv.llm import LLM
from nanokv.policies import POLICIES
from nanokv.stores import STORES
from nanokv.text.tokenizer import Tokenizer

PROTOCOLS = ("aware", "agnostic")
DEPTHS = 5  # needles lie at 0, 1/4 … 1 of the text, in turn
# What the full cache must solve before the scores of others mean anything: about half of what it does on 20 texts of 1,000 tokens. A
# wrong tokenizer, template or weight leaves almost nothing
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
    """One text of one task: the unit of work that is kept when a run is broken off."""

    task: str
    length: int
    seed: int
    at: float | None = None  # needle: always there, instead of all over

    @property
    def depth(self) -> float | None:
        if self.task != "needle":
            return None
        return self.seed % DEPTHS / (DEPTHS - 1) if self.at is None else self.at

    def make(self, words: Tokenizer) -> Task:
        def count(text: str) -> int:
            return len(words.encode(text, special=False))

        where = {} if self.depth is None else {"depth": self.depth}
        return TASKS[self.task](self.seed, self.length, count, **where)


@dataclass(frozen=True)
class Turn:
    """What is fed after the prompt, and where in it the answers stand."""

    ids: list[int]
    answers: list[tuple[int, int]]


def script(task: Task, words: Tokenizer, protocol: str) -> tuple[list[int], list[Turn]]:
    """The prompt, and the turns on its cache."""
    aware = protocol == "aware"
    prompt, turns = words.encode(task.unfinished if aware else task.context), []
    for t, asks in enumerate(task.turns):
        ids, answers = [], []
        for a, ask in enumerate(asks):
            if not (aware and t == a == 0):
                ids += words.encode_more(ask.opening)
            answer = words.encode_more(ask.answer)
            answers.append((len(ids), len(ids) + len(answer)))
            ids += answer
        turns.append(Turn(ids, answers))
    return prompt, turns


def solved(before: torch.Tensor, after: torch.Tensor, turn: Turn) -> float:
    """The share of a turn's answers that greedy writes. before (1,vocab): logits in front of it; after (T,vocab): of each token."""
    best = torch.cat((before, after)).argmax(-1).tolist()
    return sum(best[a:b] == turn.ids[a:b] for a, b in turn.answers) / len(turn.answers)


def hear(session: Session, turn: Turn) -> torch.Tensor:
    """Logits (T,vocab) of a turn as a user meets it: what is asked comes at once, answers one by one, and a store may read otherwise."""
    pieces, at = [], 0
    for a, b in turn.answers:
        pieces += [turn.ids[at:a], *([t] for t in turn.ids[a:b])]
        at = b
    fed = [session.feed(torch.tensor([x], device=session.pos.device), each=True)[0] for x in pieces if x]
    return torch.cat(fed)


def able(llm: LLM, plans: Sequence[Plan], length: int, room: int, rows: int = 1) -> tuple[list[int], dict[int, str]]:
    """Which plans can serve a prompt of this length, and why the others cannot. ValueError if the model itself cannot."""
    top = llm.config.max_position_embeddings
    if length + room > top:
        raise ValueError(
            f"{length} tokens of prompt and {room} after it are more than the {top} of this model's context; give --lengths"
        )
    good, refused = [], {}
    for i, plan in enumerate(plans):
        try:
            plan.fit(llm.config, llm.models.context.dtype, length, room, rows)
            good.append(i)
        except ValueError as e:
            refused[i] = str(e)
    return good, refused


def judge(llm: LLM, plans: Sequence[Plan], item: Item) -> list[dict]:
    """Every plan under both protocols on one text, from one prefill for each protocol. A plan that cannot serve it says why."""
    task, records = item.make(llm.tokenizer), []
    for protocol in PROTOCOLS:
        ids, turns = script(task, llm.tokenizer, protocol)
        room = sum(len(t.ids) for t in turns)
        good, refused = able(llm, plans, len(ids), room)
        records += [{"plan": i, "protocol": protocol, "refused": why} for i, why in refused.items()]
        for i, start in begin(llm, [plans[i] for i in good], ids, room):
            session, before = start()
            report, scores = session.report(), []
            for turn in turns:
                after = hear(session, turn)
                scores.append(solved(before, after, turn))
                before = after[-1:]
            report = report or session.report()  # a policy that waits has none before the first token
            size = {k: getattr(report, k) for k in ("bytes", "full_bytes", "host_bytes")}
            records.append({"plan": good[i], "protocol": protocol, "scores": scores, **size})
    return records


def text_of(llm: LLM, seed: int, tokens: int) -> list[int]:
    """Token ids of a stretch of the documentation's prose, other seeds elsewhere."""
    pool = prose()
    start, ids = seed * len(pool) // 7 % len(pool), []
    while len(ids) < tokens:
        ids = llm.tokenizer.encode(" ".join(pool[start:]))
        pool = pool + pool
    return ids[:tokens]


def fidelity(llm: LLM, plans: Sequence[Plan], seed: int, length: int, n: int) -> list[dict]:
    """Every plan against the first one, token by token, on the n tokens after `length` tokens of prose and one more: that one's odds
    come from the dense prompt. `first`: where greedy departs from what it writes under the first plan.
    """
    ids = text_of(llm, seed, length + n + 1)
    ids, text = ids[:length], ids[length:]
    good, refused = able(llm, plans, length, n + 1)
    starts = dict(begin(llm, [plans[i] for i in good], ids, n + 1))

    def read(i: int, words: Sequence[int]) -> torch.Tensor:
        session, before = starts[i]()
        return follow(session, before, len(words), lambda at, _: words[at])[1]

    session, before = starts[0]()
    written, right = follow(session, before, n + 1, greedy)
    truth, records = read(0, text), [{"plan": i, "refused": why} for i, why in refused.items()]
    for i, plan in enumerate(good):
        kl, same, *nll = (x[1:].tolist() for x in losses(truth, truth if i == 0 else read(i, text), text))
        own = losses(right, right if i == 0 else read(i, written), written)[1].tolist()
        first = own.index(False) if False in own else None
        records.append({"plan": plan, "kl": kl, "same": same, "nll": nll, "first": first})
    return records


def merged(names: Sequence[str], found: dict[tuple[int, int], list[dict]]) -> list[dict]:
    """Fidelity per plan and length, over the tokens of all its texts, (length, seed) → records. `first`: the mean, of texts that depart."""
    out = []
    for p, name in enumerate(names):
        for length in dict.fromkeys(n for n, _ in found):
            mine = [r for (n, _), records in found.items() if n == length for r in records if r["plan"] == p]
            row = {"plan": name, "length": length}
            if refused := [r["refused"] for r in mine if "refused" in r]:
                out.append({**row, "refused": refused[0]})
                continue
            kl = torch.tensor([x for r in mine for x in r["kl"]], dtype=torch.float64)
            ppl = [math.exp(mean([x for r in mine for x in r["nll"][i]])) for i in (0, 1)]
            departed = [r["first"] for r in mine if r["first"] is not None]
            row |= {"tokens": len(kl), "kl_mean": kl.mean().item(), "kl_p99": kl.quantile(0.99).item()}
            row |= {"top1": mean([x for r in mine for x in r["same"]]), "ppl_full": ppl[0], "ppl": ppl[1]}
            out.append(
                row | {"first": mean(departed) if departed else None, "departed": len(departed), "texts": len(mine)}
            )
    return out


def named(texts: Sequence[str], budgets: Sequence[str]) -> dict[str, Plan]:
    """Plans by a short name; those that take a budget and name none, once for every budget."""
    plans = {}
    for text in texts:
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
    """Every policy, full first, and under the full cache every store that takes it, once where two names say the same."""
    stores = {spec: name for name, spec in STORES.items() if name != "dense" and not spec.refuses(Plan().keep)}
    return [*POLICIES, *(f"full+{name}" for name in stores.values())]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(model: str, names: Sequence[str], records: dict[Item, list[dict]], floor: float | None) -> list[dict]:
    """Per task and length: how full did, against its floor, and every plan's mean scores and bytes."""
    out = []
    for task, length in dict.fromkeys((i.task, i.length) for i in records):
        texts = [r for i, r in records.items() if (i.task, i.length) == (task, length)]
        least = FLOORS.get(model, {}).get(task, 0.5) if floor is None else floor
        table = {}
        for p, name in enumerate(names):
            mine = {q: [r for t in texts for r in t if (r["plan"], r["protocol"]) == (p, q)] for q in PROTOCOLS}
            first = {q: [r for t in texts for r in t if (r["plan"], r["protocol"]) == (0, q)] for q in PROTOCOLS}
            table[name] = {q: _means(mine[q], first[q]) for q in PROTOCOLS}
            if refused := next((x["refused"] for x in table[name].values() if "refused" in x), None):
                table[name] = {q: {"refused": refused} for q in PROTOCOLS}
        full = mean([table[names[0]][q]["score"] for q in PROTOCOLS])
        head = {"task": task, "length": length, "texts": len(texts), "full": full, "floor": least}
        if full < least:
            head["refused"] = (
                f"the full cache itself solves {full:.0%} of {task} at {length} tokens, below its floor of {least:.0%}: "
                "a wrong tokenizer, template or weights, or a task beyond this model; scores of policies would mean nothing"
            )
            table = {names[0]: table[names[0]]}
        out.append({**head, "plans": table})
    return out


def _means(mine: list[dict], full: list[dict]) -> dict:
    """of_full: per turn, how many of the texts that full solves this plan solves too, and how many those are."""
    refused = [r["refused"] for r in mine if "refused" in r]
    if refused:
        return {"refused": refused[0]}
    found = {"score": mean([r["scores"][0] for r in mine]), "turn2": mean([r["scores"][1] for r in mine])}
    found |= {k: mean([r.get(k, 0) for r in mine]) for k in ("bytes", "full_bytes", "host_bytes")}
    both = [[m["scores"][i] == 1 for m, f in zip(mine, full, strict=True) if f["scores"][i] == 1] for i in (0, 1)]
    return found | {"of_full": [[sum(x), len(x)] for x in both]}


def grid(
    names: Sequence[str], records: dict[Item, list[dict]], parts: Sequence[dict]
) -> dict[str, dict[str, list[list]]]:
    """Needles by place, where full reached its floor: plan → protocol → [length, depth, score] of every cell."""
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
