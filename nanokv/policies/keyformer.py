"""Heavy hitters whose attention scores carry noise, so that not the same few always win."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.cache.scores import ScoreRequest
from nanokv.policies.h2o import H2O


@dataclass(frozen=True, kw_only=True)
class Keyformer(H2O):
    """Keyformer (Adnan et al. 2024, arXiv:2403.09054, §3): as H2O, but the scores are softmax((logits + Gumbel noise)
    / tau).

    Defaults: 60 % of the prompt, 30 % of these recent. Deviations from the authors' code: tau is constant, where
    theirs rises from 1 to 2 over the tokens that will be generated and so depends on their number; the noise is a
    hash of the seed, the head and the two tokens and the same in every layer, so chunks and batches get the same
    noise.

    recent  share of the budget for the last tokens
    tau     temperature of the softmax
    seed    of the noise
    """

    budget: int | str = "60%"
    recent: float = 0.3
    tau: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.tau > 0 or not 0 <= self.seed < 2**31:
            raise ValueError(
                f"keyformer:tau={self.tau},seed={self.seed} is out of range; tau > 0, seed from 0 to 2^31 − 1"
            )
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=None, gumbel_seed=self.seed, temperature=self.tau)

    @property
    def decode_request(self) -> ScoreRequest:
        return ScoreRequest(gumbel_seed=self.seed, temperature=self.tau)
