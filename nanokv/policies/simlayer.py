"""Lazy layers look at the beginning and the end only, so they need to keep no more."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nanokv.cache.budget import Case
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import Ask
from nanokv.policies.base import Policy

# per model line, as in the authors' code; smollm2's is ours: smollm2-135m's median layer lies at 0.84–0.93 over 2,000–7,000 tokens of prose
THRESHOLDS = {"llama2": 0.65, "llama3": 0.9, "mistral": 0.8, "qwen2": 0.85, "smollm2": 0.9}


@dataclass(frozen=True, kw_only=True)
class SimLayerKV(Policy):
    """SimLayerKV (Zhang et al. 2024, arXiv:2410.13846 v1, §3) and its successor LightTransfer (v2, §4).

    A layer's laziness is the attention that the last queries pay to the first `sink` and last `recent` tokens, averaged over
    heads. variant=prefill: layers above `threshold` are lazy, judged by the last `window` prompt tokens. decode: judged by the first
    token after the prompt, which still sees everything (the released code). light: all but the `full` least lazy layers are lazy.
    A lazy layer keeps sink + recent tokens, as a ring (`roll`) or, in the released code, growing.
    Deviations from the authors' code: a prompt within sink + recent is never lazy (theirs counts sinks twice and then
    doubles them); one decision per row of a batch; fp32; light applies scale and causality, which the paper's snippet lacks.
    """

    variant: str = "prefill"  # prefill | decode | light
    threshold: float | None = None  # none: by model family
    sink: int = 4
    recent: int | None = None  # none: 1024, in light 1020
    window: int | None = None  # none: 32, in decode 1
    roll: bool | None = None  # none: true, in decode false
    full: int | str = "50%"  # light: layers that stay whole
    whole = True

    def __post_init__(self):
        if self.variant not in ("prefill", "decode", "light"):
            raise ValueError(f"simlayer:variant={self.variant}; variants are prefill, decode and light")
        if self.sink < 0 or min(1 if x is None else x for x in (self.recent, self.window)) < 1:
            raise ValueError(
                f"simlayer:sink={self.sink},recent={self.recent},window={self.window} is out of range; at least 0, 1, 1"
            )
        if not (self.full >= 0 if isinstance(self.full, int) else re.fullmatch(r"(100|\d?\d(\.\d+)?)%", self.full)):
            raise ValueError(f"simlayer:full={self.full}; give a number of layers or a percent such as 50%")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"simlayer:threshold={self.threshold}; it is a share of attention, from 0 to 1")

    @property
    def ask(self) -> Ask:
        return Ask(rows=self.window)

    @property
    def wait(self) -> int:
        return 1 if self.variant == "decode" else 0

    def fit(self, case: Case) -> SimLayerKV:
        default = {
            "recent": 1020 if self.variant == "light" else 1024,
            "window": 1 if self.variant == "decode" else 32,
            "roll": self.variant != "decode",
        }
        mine = replace(self, **{k: v for k, v in default.items() if getattr(self, k) is None})
        if self.variant == "light":
            full = self.full if isinstance(self.full, int) else int(case.owners * float(self.full[:-1]) / 100)
            return replace(mine, full=min(full, case.owners))
        if self.threshold is None and case.family not in THRESHOLDS:
            raise ValueError(
                f"simlayer knows no threshold for this model family (it does for {', '.join(THRESHOLDS)}); "
                "give one, as in simlayer:threshold=0.8, or use simlayer:variant=light, which needs none"
            )
        return mine if self.threshold is not None else replace(mine, threshold=THRESHOLDS[case.family])

    def keep(self, p: Prompt) -> Kept:
        if len(p) <= self.sink + self.recent:
            return Kept.all(p)  # everything is sink or recent: the mass would be 1 in every layer
        edges = p.first(self.sink) | p.last(self.recent)
        mass = (p.votes * edges).sum(-1).mean(
            -1
        ).min().item() / p.n_votes  # the least lazy reader speaks for a shared layer
        kept = Kept.all(p, score=mass)
        return self.trim(kept) if self.variant != "light" and mass > self.threshold else kept

    def settle(self, kept: dict[int, Kept]) -> dict[int, Kept]:
        if self.variant != "light":
            return kept
        whole = [i for i, k in kept.items() if k.k.shape[2] > self.sink + self.recent]
        if len(whole) <= self.full:
            return kept
        lazy = max(whole, key=lambda i: kept[i].score)
        return {**kept, lazy: self.trim(kept[lazy])}

    def trim(self, kept: Kept) -> Kept:
        return kept.edges(self.sink, self.recent, self.roll, score=kept.score)
