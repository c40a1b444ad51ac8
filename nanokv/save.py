"""A compressed prompt as a file: safetensors with what each layer keeps, and the model and plan that it belongs to.

Only kept tokens are written, so the file is as small as the cache. It fits one model, and loading it with another is
refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan, parse
from nanokv.cache.validate import check_row
from nanokv.engine import Session
from nanokv.files import is_there, quoted, reason, replacing
from nanokv.llm import LLM
from nanokv.model.config import MAX_NUMBER
from nanokv.sharing.search import checked_map

FIELDS = ("k", "v", "pos", "length", "limit", "sink")
STATE = "codes."  # prefix of the tensors of a store's state
PLACES = ("question", "answer")  # where a saved text may end in the chat template


def save(llm: LLM, session: Session, file: Path, place: str | None = None) -> None:
    """Write row 0 of a session, first beside the file and then renamed. place: one of PLACES, if the text is in the chat
    template. ValueError if there is nothing to save yet or it cannot be written.
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
        layer_scores[str(owner)] = session.cache.layer_scores[owner][0]
        for i, part in enumerate(store.unpack()[0].parts):
            found = _tensors(part, store.lossless_prefix)
            tensors |= {f"{owner}.{i}.{field}": x.contiguous() for field, x in found.items()}
    facts = {"plan": str(session.plans[0]), "seen": session.seen[0], "model": llm.fingerprint(), "scores": layer_scores}
    facts |= {"name": llm.name, "place": place}
    facts["share"] = {str(i): owner for i, owner in session.plans[0].share.items()}
    facts["checksum"] = checksum(tensors, json.loads(json.dumps(facts)))
    try:
        with replacing(file) as part:
            save_file(tensors, part, metadata={"nanokv": json.dumps(facts)})
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{file} cannot be written ({reason(e)})") from None


def place_of(file: Path) -> str | None:
    """Where the text of a saved cache ends in the chat template, one of PLACES; None: it is plain text, or the file is none
    of ours, which `restore` tells.
    """
    try:
        is_there(file)  # a pipe would wait
        with safe_open(file, framework="pt") as f:
            place = json.loads((f.metadata() or {})["nanokv"])["place"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        return None
    return place if place in PLACES else None


def restore(llm: LLM, file: Path, room: int) -> Session:
    """A session that goes on where the saved one stood, under its plan. ValueError if the file is not one of ours, not
    complete, or holds what no session can have saved.
    """
    try:
        is_there(file)
        with safe_open(file, framework="pt") as f:
            facts = json.loads((f.metadata() or {})["nanokv"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 the library's handle is no dict
        if not isinstance(facts, dict):
            raise ValueError("its facts are no object")
        if "checksum" in facts and facts["checksum"] != checksum(tensors, facts):  # older files have none
            raise ValueError("it is damaged: its checksum is another one")
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as e:
        raise ValueError(f"{file} is no complete saved cache ({reason(e)})") from None
    if facts.get("model") != llm.fingerprint():
        name = facts.get("name")
        other = f"the model {quoted(name)}" if isinstance(name, str) else "another model"
        raise ValueError(f"{file} was saved with {other}; give that one as --model")
    saved: set[str] = set()
    try:
        plan, seen = _plan_and_seen(facts, llm)
        tensors = {name: x.to(llm.device) for name, x in tensors.items()}
        saved = {str(x.dtype).removeprefix("torch.") for name, x in tensors.items() if name.endswith((".k", ".v"))}
        row = _rows(tensors, facts.get("scores"), plan, llm)
        for owner, kept in row.items():
            _check(kept, seen, plan, owner, llm)
        session = llm.session(room, plan=plan)
        session.restore(plan, row, seen)
        for owner, store in session.cache.stores.items():
            rounds = plan.store.at(owner, llm.config.num_hidden_layers).state_type is not None
            # codes may stand for values that are no numbers; what is no code was looked at before
            if rounds and not all(x.isfinite().all() for part in store.unpack()[0].parts for x in (part.k, part.v)):
                raise ValueError(f"layer {owner} holds values that are no numbers")
    except (KeyError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as e:
        hint = ""
        if saved - {llm.cache_dtype}:
            hint = f"; it was saved in {min(saved)} and this run holds {llm.cache_dtype}, so try --dtype {min(saved)}"
        raise ValueError(f"{file} is no saved cache of this model ({reason(e)}){hint}") from None
    return session


def checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """A hash of all tensors and of the facts beside it."""
    found = hashlib.sha256(json.dumps({k: v for k, v in facts.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _plan_and_seen(facts: Mapping[str, Any], llm: LLM) -> tuple[Plan, int]:
    """The plan with its map of shared layers, and the length of the text."""
    plan, seen = facts.get("plan"), facts.get("seen")
    if not isinstance(plan, str) or not isinstance(seen, int) or isinstance(seen, bool) or not 0 < seen < MAX_NUMBER:
        raise ValueError(f"its plan is {quoted(plan)} and its text has {quoted(seen)} tokens")
    share = checked_map(facts.get("share", {}), llm.config, "the file")
    found = replace(parse(plan), share=share, ready=True)
    if found.fit(llm.config, llm.models.new_context().dtype, seen, 1).policy != found.policy:
        raise ValueError(f"its plan {quoted(plan)} is not that of a prompt")  # with percentages, say
    return found, seen


def _check(kept: Kept, seen: int, plan: Plan, owner: int, llm: LLM) -> None:
    """ValueError unless the session can have held this row of one layer."""
    store, ctx = plan.store.at(owner, llm.config.num_hidden_layers), llm.models.new_context().of_layer(owner)
    parts = kept.parts
    if len(parts) not in ((2, 3) if store.has_low_precision_tier else (1,)):
        raise ValueError(f"layer {owner} holds {len(parts)} sets of tokens")
    if plan.policy.eviction == "none" and not (kept.limit == -1).all():
        raise ValueError(f"layer {owner} has heads with a limit, and its policy sets none")
    if plan.policy.decode_request and kept.running_scores is None:
        raise ValueError(f"layer {owner} has no running scores")
    if not any(part.pos.numel() for part in parts):
        raise ValueError(f"layer {owner} holds no token")
    for part in parts:
        try:
            check_row(part, llm.config, seen, plan.policy.protected_sinks)
            if part.state is not None:
                part.state.check(part, store, ctx)
        except ValueError as e:
            raise ValueError(f"layer {owner}: {e}") from None


def _tensors(part: Kept, lossless_prefix: int | None) -> dict[str, Tensor]:
    """What the file holds of one set of tokens. Of rounded tokens it holds the store's state, not keys and values."""
    found = {field: getattr(part, field) for field in FIELDS}
    if part.running_scores is not None:
        found["attention"] = part.running_scores
    if part.state is not None:
        found |= {"k": part.k[:, :, :lossless_prefix], "v": part.v[:, :, :lossless_prefix]}
        found |= {STATE + name: x for name, x in part.state.tensors().items()}
    return found


def _rows(tensors: Mapping[str, Tensor], scores: Any, plan: Plan, llm: LLM) -> dict[int, Kept]:
    """What `_tensors` wrote of each layer. KeyError or ValueError if some of it is missing, or there is more."""
    n_layers = llm.config.num_hidden_layers
    owners = [i for i in range(n_layers) if plan.owner(i) == i]
    if not isinstance(scores, dict) or set(scores) != {str(i) for i in owners}:
        raise ValueError("it does not hold the layers of its plan")
    sets: dict[int, dict[int, dict[str, Tensor]]] = {i: {} for i in owners}
    for name, x in tensors.items():
        match = re.fullmatch(r"(\d{1,6})\.([0-2])\.(.+)", name)
        if match is None or int(match[1]) not in sets:
            raise ValueError(f"it holds {quoted(name)}")
        sets[int(match[1])].setdefault(int(match[2]), {})[match[3]] = x
    found = {}
    for owner in owners:
        score = scores[str(owner)]
        if not isinstance(score, int | float) or not abs(score) < 1e30:
            raise ValueError(f"layer {owner} has the score {quoted(score)}")
        kept = None
        for i in reversed(range(len(sets[owner]))):
            kept = _kept(sets[owner].get(i, {}), owner, float(score), kept, plan.store.at(owner, n_layers).state_type)
        if kept is None:
            raise KeyError(f"layer {owner} is missing")
        found[owner] = kept
    return found


def _kept(values: dict[str, Tensor], owner: int, score: float, demoted: Kept | None, state_type: Any) -> Kept:
    """One set of tokens of one layer."""
    if any(field not in values for field in FIELDS):
        raise KeyError(f"layer {owner} is incomplete")
    state = {name.removeprefix(STATE): x for name, x in values.items() if name.startswith(STATE)}
    unknown = set(values) - {*FIELDS, "attention", "votes", *(STATE + name for name in state)}
    if unknown or (state and state_type is None):
        raise ValueError(f"layer {owner} holds {quoted(min(unknown, default='codes'))}")
    k, v, pos, *numbers = (values[field] for field in FIELDS)
    if state and k.dim() == v.dim() == 4 and pos.dim() == 3:  # of rounded tokens only the first ones are there
        k, v = (
            torch.cat((x, x.new_zeros(*x.shape[:2], max(0, pos.shape[2] - x.shape[2]), x.shape[3])), 2) for x in (k, v)
        )
    try:
        record = state_type.from_tensors(state) if state else None
    except (ArithmeticError, IndexError, RuntimeError, TypeError) as e:  # a tensor of another shape or type
        raise ValueError(f"layer {owner}: {reason(e)}") from None
    # files call the running scores "attention", older ones "votes"
    return Kept(
        k,
        v,
        pos,
        *numbers,
        running_scores=values.get("attention", values.get("votes")),
        layer_score=score,
        demoted=demoted,
        state=record,
    )
