"""What rounding does to real keys and values: how far each store's are from those it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch

from evals.quality import text_of
from nanokv.cache.plan import Plan
from nanokv.llm import LLM


def codes(llm: LLM, plans: Mapping[str, Plan], length: int) -> list[dict]:
    """Per plan: bits per element, and the relative mean squared error of K and of V of a text's tokens, mean and worst over layers. Nothing
    is left exact but what is pinned: a window would only thin the error out.
    """
    session = llm.session(1, plan=Plan())
    session.start([text_of(llm, 0, length)])
    truth = [store.unpack() for store in session.cache.stores.values()]
    found = []
    for name, plan in plans.items():
        spec = plan.store
        if "residual" in {f.name for f in fields(spec)}:
            spec = replace(spec, residual=0)
        errors, sizes = {"k": [], "v": []}, torch.zeros(2)
        for rows in truth:
            store = spec.pack(rows, plan.keep, 1, session.context)
            back, held = store.unpack()[0], int(store.length.sum()) * llm.config.head_dim
            sizes += torch.tensor(store.live()[:2]) * 8 / held
            whole = length // spec.granule * spec.granule  # behind it lies a group that is not complete
            for x in errors:
                true, mine = (getattr(r, x)[:, :, :whole].double() for r in (rows[0], back))
                errors[x].append(((mine - true).pow(2).sum() / true.pow(2).sum()).item())
        row = {"plan": name, "tokens": length} | {
            f"{x}_bits": s.item() / len(truth) for x, s in zip("kv", sizes, strict=True)
        }
        for x, of_layers in errors.items():
            row |= {f"{x}_mse": sum(of_layers) / len(truth), f"{x}_worst": max(of_layers)}
        found.append(row)
    return found
