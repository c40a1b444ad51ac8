"""Measure the error that each store's rounding makes in real keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch

from evals.quality import text_of
from nanokv.cache.plan import Plan
from nanokv.llm import LLM


def codes(llm: LLM, plans: Mapping[str, Plan], length: int) -> list[dict]:
    """Return, per plan, the bits per element and the relative mean squared errors of K and V on one text.

    The error is given as the mean over layers and as the worst layer. Residual windows are set to 0, because exact
    tokens would hide the error; only pinned tokens stay exact.
    """
    session = llm.session(1, plan=Plan())
    session.start([text_of(llm, 0, length)])
    dense = [store.unpack() for store in session.cache.stores.values()]
    table = []
    for name, plan in plans.items():
        spec = plan.store
        if "residual" in {f.name for f in fields(spec)}:
            spec = replace(spec, residual=0)
        errors, sizes = {"k": [], "v": []}, torch.zeros(2)
        for rows in dense:
            store = spec.pack(rows, plan.policy, 1, session.context)
            restored, elements = store.unpack()[0], int(store.length.sum()) * llm.config.head_dim
            sizes += torch.tensor(store.used_bytes()[:2]) * 8 / elements
            end = length // spec.eviction_granularity * spec.eviction_granularity  # the end of the last complete group
            for x in errors:
                exact, rounded = (getattr(r, x)[:, :, :end].double() for r in (rows[0], restored))
                errors[x].append(((rounded - exact).pow(2).sum() / exact.pow(2).sum()).item())
        row = {"plan": name, "tokens": length} | {
            f"{x}_bits": s.item() / len(dense) for x, s in zip("kv", sizes, strict=True)
        }
        for x, per_layer in errors.items():
            row |= {f"{x}_mse": sum(per_layer) / len(dense), f"{x}_worst": max(per_layer)}
        table.append(row)
    return table
