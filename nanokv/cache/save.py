"""A compressed prompt as a file: safetensors with what each layer keeps, and the model and plan that it belongs to.

Only kept tokens are written, so the file is as small as the cache. It fits one model, and loading it with another is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan, parse
from nanokv.engine import Session
from nanokv.files import replacing
from nanokv.llm import LLM

FIELDS = ("k", "v", "pos", "length", "limit", "sink")
STATE = "codes."  # prefix of the tensors of a store's state


def save(llm: LLM, session: Session, file: Path) -> None:
    """Write row 0 of a session, first beside the file and then renamed. ValueError if there is nothing to save yet or
    it cannot be written.
    """
    name = session.plan.names[0]
    if session.cache is None:
        raise ValueError(f"{name} decides at the first token after the prompt; there is nothing to save yet")
    if (every := session.plans[0].policy.rescore_every) and session.cache.since_rescore:
        raise ValueError(
            f"{name} rescores every {every} tokens, and {session.cache.since_rescore} have come since; save right after the prompt"
        )
    tensors, layer_scores = {}, {}
    for owner, store in session.cache.stores.items():
        layer_scores[owner] = session.cache.layer_scores[owner][0]
        for i, part in enumerate(store.unpack()[0].parts):
            found = _tensors(part, store.lossless_prefix)
            tensors |= {f"{owner}.{i}.{field}": x.contiguous() for field, x in found.items()}
    facts = {"plan": str(session.plans[0]), "seen": session.seen[0], "model": llm.fingerprint(), "scores": layer_scores}
    facts["share"] = session.plans[0].share
    try:
        with replacing(file) as part:
            save_file(tensors, part, metadata={"nanokv": json.dumps(facts)})
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{file} cannot be written ({str(e).splitlines()[0]})") from None


def restore(llm: LLM, file: Path, room: int) -> Session:
    """A session that goes on where the saved one stood, under its plan. ValueError if the file is not one of ours or
    not complete.
    """
    try:
        with safe_open(file, framework="pt", device=str(llm.device)) as f:
            facts = json.loads((f.metadata() or {})["nanokv"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 the library's handle is no dict
        if facts["model"] != llm.fingerprint():
            raise ValueError(f"{file} was saved with another model; give the --model that it was made with")
        plan = replace(parse(facts["plan"]), share={int(i): o for i, o in facts.get("share", {}).items()}, ready=True)
        n_layers = llm.config.num_hidden_layers
        row = {int(o): _kept(tensors, o, score, plan, n_layers) for o, score in facts["scores"].items()}
        session = llm.session(room, plan=plan)
        session.restore(plan, row, facts["seen"])
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{file} is no complete saved cache ({(str(e) or 'empty').splitlines()[0]})") from None
    return session


def _tensors(part: Kept, lossless_prefix: int | None) -> dict[str, Tensor]:
    """What the file holds of one set of tokens. Of rounded tokens it holds the store's state, not keys and values."""
    found = {field: getattr(part, field) for field in FIELDS}
    if part.attention is not None:
        found["attention"] = part.attention
    if part.state is not None:
        found |= {"k": part.k[:, :, :lossless_prefix], "v": part.v[:, :, :lossless_prefix]}
        found |= {STATE + name: x for name, x in part.state.tensors().items()}
    return found


def _kept(tensors: Mapping[str, Tensor], owner: str, score: float, plan: Plan, n_layers: int) -> Kept:
    """What `_tensors` wrote of one layer. KeyError if some of it is missing."""
    sets: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        layer, i, field = name.split(".", 2)
        if layer == owner:
            sets.setdefault(int(i), {})[field] = x
    kept = None
    for i in reversed(range(len(sets))):
        values = sets[i]
        if any(field not in values for field in FIELDS):
            raise KeyError(f"layer {owner} is incomplete")
        state = {name.removeprefix(STATE): x for name, x in values.items() if name.startswith(STATE)}
        state_type = plan.store_of(int(owner), n_layers).state_type
        n = values["pos"].shape[2]
        for field in ("k", "v"):
            x = values[field]
            values[field] = torch.cat((x, x.new_zeros(*x.shape[:2], n - x.shape[2], x.shape[3])), 2)
        kept = Kept(
            *(values[field] for field in FIELDS),
            attention=values.get("attention", values.get("votes")),  # older files call it "votes"
            layer_score=score,
            demoted=kept,
            state=state_type.from_tensors(state) if state else None,
        )
    if kept is None:
        raise KeyError(f"layer {owner} is missing")
    return kept
