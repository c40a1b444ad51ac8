"""A compressed prompt as a file: safetensors with the survivors of each layer, and what they belong to.

Only what was kept is written, so the file is as small as the cache. It fits one model and says so otherwise.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanokv.cache.kept import Kept
from nanokv.cache.plan import parse
from nanokv.engine import Session
from nanokv.llm import LLM

FIELDS = ("k", "v", "pos", "length", "limit", "sink", "votes")


def save(llm: LLM, session: Session, file: Path) -> None:
    """Write row 0 of a session, beside and then renamed. ValueError if a policy still waits or the file cannot be written."""
    if session.cache is None:
        raise ValueError(
            f"{session.plan.names[0]} decides at the first token after the prompt; there is nothing to save yet"
        )
    if session.plans[0].keep.every and session.cache.fresh:
        raise ValueError(
            f"{session.plan.names[0]} looks again every {session.plans[0].keep.every} tokens, and {session.cache.fresh} have come "
            "since; save right after the prompt"
        )
    tensors, scores = {}, {}
    for owner, store in session.cache.stores.items():
        scores[owner] = session.cache.scores[owner][0]
        for i, part in enumerate(store.unpack()[0].parts):
            tensors |= {f"{owner}.{i}.{name}": x.contiguous() for name, x in _tensors(part, store.exact).items()}
    facts = {"plan": str(session.plans[0]), "seen": session.seen[0], "model": llm.fingerprint(), "scores": scores}
    facts["share"] = session.plans[0].share
    part = file.with_name(f".{file.name}.part")
    try:
        save_file(tensors, part, metadata={"nanokv": json.dumps(facts)})
        os.replace(part, file)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{file} cannot be written ({str(e).splitlines()[0]})") from None


def restore(llm: LLM, file: Path, room: int) -> Session:
    """A session that goes on where the saved one stood, under its plan. ValueError if the file is not one of ours or not whole."""
    try:
        with safe_open(file, framework="pt", device=str(llm.device)) as f:
            facts = json.loads((f.metadata() or {})["nanokv"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 the library's handle is no dict
        if facts["model"] != llm.fingerprint():
            raise ValueError(f"{file} was saved with another model; give the --model that it was made with")
        plan = replace(parse(facts["plan"]), share={int(i): o for i, o in facts.get("share", {}).items()}, ready=True)
        row = {int(o): _kept(tensors, o, score) for o, score in facts["scores"].items()}
        session = llm.session(room, plan=plan)
        session.restore(plan, row, facts["seen"])
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{file} is no saved cache that is whole ({(str(e) or 'empty').splitlines()[0]})") from None
    return session


def _tensors(part: Kept, exact: int | None) -> dict[str, torch.Tensor]:
    """What a file holds of one set: of tokens that a store has rounded their codes, and keys and values only of those it has not."""
    found = {f: getattr(part, f) for f in FIELDS if getattr(part, f) is not None}
    if part.codes is not None:
        found |= {"k": part.k[:, :, :exact], "v": part.v[:, :, :exact]}
        found |= {f"codes.{name}": x for name, x in part.codes.items()}
    return found


def _kept(tensors: dict[str, torch.Tensor], owner: str, score: float) -> Kept:
    sets: dict[int, dict[str, torch.Tensor]] = {}
    for name, x in tensors.items():
        of, i, field = name.split(".", 2)
        if of == owner:
            sets.setdefault(int(i), {})[field] = x
    kept = None
    for i in reversed(range(len(sets))):
        values = sets[i]
        if any(f not in values for f in FIELDS[:-1]):
            raise KeyError(f"layer {owner} is incomplete")
        codes = {name[len("codes.") :]: x for name, x in values.items() if name.startswith("codes.")}
        n = values["pos"].shape[2]
        for f in ("k", "v"):
            values[f] = torch.cat((x := values[f], x.new_zeros(*x.shape[:2], n - x.shape[2], x.shape[3])), 2)
        kept = Kept(*(values.get(f) for f in FIELDS), score=score, rest=kept, codes=codes or None)
    if kept is None:
        raise KeyError(f"layer {owner} is missing")
    return kept
