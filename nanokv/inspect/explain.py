"""What a cache holds (--explain), and what plans would keep (--plan).

It reads stores only through `unpack`, and it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from nanokv.cache.budget import check_budget
from nanokv.cache.plan import Plan, parse
from nanokv.cache.report import mib
from nanokv.device import free_bytes
from nanokv.engine import Session
from nanokv.model.config import ModelConfig
from nanokv.model.presets import PRESETS
from nanokv.policies import POLICIES
from weights.registry import MODELS

SHADES = " ░▒▓█"


def explain(session: Session, width: int = 64) -> str:
    """One line per layer: how many tokens its heads hold, and where in the text they stand.

    A line has at most `width` cells. A cell's shade is the share of its (head, token) pairs that are kept.
    """
    cache, lines = session.cache, []
    for row, seen in enumerate(session.seen):
        cell = max(1, -(-seen // width))  # tokens per cell
        lines.append(f"row {row}: {seen} tokens, {cell} per cell; {SHADES[0]!r} none kept … {SHADES[-1]!r} all kept")
        for layer in range(len(cache.layers)):
            owner = cache.plan.owner(layer)
            if owner != layer:
                lines.append(f"layer {layer:3}  reads layer {owner}'s")
                continue
            kept = [0] * -(-seen // cell)
            for positions in held_positions(session, owner, row):
                for p in positions:
                    kept[p // cell] += 1
            counts = cache.stores[owner].length[row].tolist()  # tokens per head
            cells = "".join(_shade(n, len(counts) * min(cell, seen - i * cell)) for i, n in enumerate(kept))
            span = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"
            score = f"  score {cache.layer_scores[owner][row]:.2f}" if cache.layer_scores[owner][row] else ""
            lines.append(f"layer {layer:3}  {span:>9}  |{cells}|{score}")
    return "\n".join(lines)


def held_positions(session: Session, owner: int, row: int) -> Iterator[list[int]]:
    """For each head of a layer, and for each tier of its store: the positions that are held."""
    for part in session.cache.stores[owner].unpack()[row].parts:
        for pos, n in zip(part.pos[0].tolist(), part.length[0].tolist(), strict=True):
            yield pos[:n]


def _shade(kept: int, total: int) -> str:
    return SHADES[-(-kept * (len(SHADES) - 1) // total)]


def sizes(model: str, plans: Mapping[str, Plan], room: int, budget: str | None = None) -> str:
    """A table of what these plans and all policies, under `budget` where they take one, keep of the longest prompt that
    leaves `room` new tokens in the context.

    It shows tokens per KV head, bytes of the cache, the ratio to a dense cache, and whether model, cache and the part of
    the prompt that waits uncompressed fit the free memory. It needs the model's shape only, so nothing is fetched or loaded.
    """
    config, dtype = _shape(model), torch.bfloat16
    n_layers = config.num_hidden_layers
    free = free_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    weights = config.parameters() * dtype.itemsize
    n = config.max_position_embeddings - room
    if n < 1:
        raise ValueError(
            f"-n {room} leaves no room for a prompt in this model's context of {config.max_position_embeddings}"
        )
    if budget:
        check_budget(int(budget) if budget.isdigit() else budget, 1, "a head keeps at least one")
    given, plans = plans, {**plans, **{name: parse(name) for name in POLICIES if name not in plans}}
    width = max(map(len, plans))
    per_token = config.num_key_value_heads * 2 * config.head_dim * dtype.itemsize
    dense = n_layers * (n + room) * per_token
    under = f", under {budget} where a policy takes a budget" if budget else ""
    lines = [f"{n} tokens of prompt and {room} new ones{under}; weights {mib(weights)}, {mib(free)} free"]
    for name, plan in plans.items():
        takes_budget = name not in given and any(f.name == "budget" for f in fields(plan.policy))
        try:
            plan = plan.with_budget(budget) if budget and takes_budget else plan
            plan = plan.sketch(n_layers).fit(config, dtype, n, room)
        except ValueError as e:
            lines.append(f"{name:{width}} {str(e).removeprefix(f'{name}: ')}")
            continue
        size = int(plan.n_owners(n_layers) * plan.device_bytes(config, dtype, n, room))
        kept = n if plan.policy.demotes else plan.policy.max_kept(n)
        waiting = plan.prompt_layers(n, n_layers) * n * per_token
        fits = "fits" if size + waiting + weights <= free else "does not fit"
        if plan.policy.passes(n):
            fits = "its scoring passes need a shorter prompt"
        lines.append(
            f"{name:{width}} at most {kept:>7} tokens per head on average  {mib(size):>10}  {dense / size:5.1f}x  {fits}"
        )
    lines.append("not counted: slots that pad shorter heads where the heads of a layer compete; ragged has none")
    return "\n".join(lines)


def _shape(model: str) -> ModelConfig:
    if model in MODELS:
        return PRESETS[MODELS[model].shape]
    if Path(model).is_dir():
        return ModelConfig.from_dir(Path(model))
    raise ValueError(f"--plan needs a model's directory or a name of --list-models, not {model!r}")
