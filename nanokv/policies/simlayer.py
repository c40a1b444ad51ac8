"""Lazy layers attend to the beginning and the end of the text only, so they need to keep no more."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nanokv.cache.budget import Workload
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.policies.base import Policy

# Per model family, as in the authors' code. smollm2's is ours: its median layer lies at 0.84–0.93 over 2,000–7,000
# tokens of prose
THRESHOLDS = {"llama2": 0.65, "llama3": 0.9, "mistral": 0.8, "qwen2": 0.85, "smollm2": 0.9}


@dataclass(frozen=True, kw_only=True)
class SimLayerKV(Policy):
    """SimLayerKV (Zhang et al. 2024, arXiv:2410.13846 v1, §3) and its successor LightTransfer (v2, §4).

    A layer's laziness is the share of attention that the last queries give to the first `sink` and the last `recent`
    tokens, averaged over heads. variant=prefill: layers whose laziness, by the prompt's last `window` queries,
    exceeds `threshold` are lazy. decode: the same by the first token after the prompt, which still sees everything
    (the released code). light: all but the `full` least lazy layers are lazy. A lazy layer keeps sink + recent
    tokens. With `roll` it then stays at that number, as a ring; without it, as in the released code, it grows.
    Deviations from the authors' code: in a prompt of at most sink + recent tokens no layer is lazy (theirs counts
    sinks twice and then doubles them); each row of a batch decides alone; scores are fp32; light applies scale and
    causality, which the paper's snippet lacks.

    variant    prefill, decode or light (see above)
    threshold  a layer with more laziness is lazy; none: by model family
    sink       first tokens that a lazy layer keeps
    recent     last tokens that a lazy layer keeps; none: 1024, in light 1020
    window     last queries whose attention is measured; none: 32, in decode 1
    roll       whether a lazy layer stays at its size while decoding; none: true, in decode false
    full       light: how many layers, or percent of them, keep everything
    """

    variant: str = "prefill"  # prefill | decode | light
    threshold: float | None = None  # None: by model family
    sink: int = 4
    recent: int | None = None  # None: 1024, in light 1020
    window: int | None = None  # None: 32, in decode 1
    roll: bool | None = None  # None: true, in decode false
    full: int | str = "50%"  # light: layers that keep everything
    keeps_all_or_edges = True
    eviction = "ring"

    def __post_init__(self):
        if self.variant not in ("prefill", "decode", "light"):
            raise ValueError(f"simlayer:variant={self.variant}; variants are prefill, decode and light")
        if self.sink < 0 or min(1 if x is None else x for x in (self.recent, self.window)) < 1:
            raise ValueError(
                f"simlayer:sink={self.sink},recent={self.recent},window={self.window} is out of range; "
                "sink ≥ 0, recent and window ≥ 1"
            )
        if not (self.full >= 0 if isinstance(self.full, int) else re.fullmatch(r"(100|\d?\d(\.\d+)?)%", self.full)):
            raise ValueError(f"simlayer:full={self.full}; give a number of layers or a percent such as 50%")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"simlayer:threshold={self.threshold}; it is a share of attention, from 0 to 1")

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=self.window)

    @property
    def decide_after(self) -> int:
        return 1 if self.variant == "decode" else 0

    @property
    def cross_layer(self) -> bool:
        return self.variant == "light"

    @property
    def protected_sinks(self) -> int:
        return self.sink

    def fit(self, work: Workload) -> SimLayerKV:
        default = {
            "recent": 1020 if self.variant == "light" else 1024,
            "window": 1 if self.variant == "decode" else 32,
            "roll": self.variant != "decode",
        }
        mine = replace(self, **{k: v for k, v in default.items() if getattr(self, k) is None})
        if self.variant == "light":
            full = self.full if isinstance(self.full, int) else int(work.owners * float(self.full[:-1]) / 100)
            return replace(mine, full=min(full, work.owners))
        if self.threshold is None and work.family not in THRESHOLDS:
            raise ValueError(
                f"simlayer knows no threshold for this model family (it does for {', '.join(THRESHOLDS)}); "
                "give one, as in simlayer:threshold=0.8, or use simlayer:variant=light, which needs none"
            )
        return mine if self.threshold is not None else replace(mine, threshold=THRESHOLDS[work.family])

    def keep(self, p: Prompt) -> Kept:
        kept = self._with_laziness(p)
        return self._trim(kept) if kept.layer_score > self.threshold else kept

    def keep_all(self, prompts: list[Prompt]) -> list[Kept]:
        """light: of the layers that are long enough to be lazy, all but the `full` least lazy ones are trimmed."""
        kept = [self._with_laziness(p) for p in prompts]
        long = [i for i, p in enumerate(prompts) if len(p) > self.sink + self.recent]
        by_laziness = sorted(long, key=lambda i: (kept[i].layer_score, -i))  # among equals the earlier layer is lazy
        lazy = set(by_laziness[self.full :])
        return [self._trim(k) if i in lazy else k for i, k in enumerate(kept)]

    def _with_laziness(self, p: Prompt) -> Kept:
        """Every token, with its laziness as the layer's score. A layer that others read is as lazy as its least lazy
        reader.
        """
        if len(p) <= self.sink + self.recent:
            return Kept.all(p)  # every token is a sink or recent: the laziness would be 1 in every layer
        edges = p.sinks(self.sink) | p.recent(self.recent)
        per_reader = (p.attention * edges).sum(-1).mean(-1)
        return Kept.all(p, layer_score=per_reader.min().item() / p.n_queries)

    def _trim(self, kept: Kept) -> Kept:
        return kept.edges(self.sink, self.recent, self.roll, layer_score=kept.layer_score)
