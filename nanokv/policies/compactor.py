"""Tokens stay whose keys lie far from the rest, or that the tokens around them attend to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.model.rope import unrotated
from nanokv.policies.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Compactor(Scorer):
    """Compactor (Chari & Van Durme 2025, arXiv:2507.08143): no query of the end of the prompt is used, so the question may
    come later. A token's score is the sum of two, each standardised over all heads of the layer.

    The first is the statistical leverage of its key before rotation, x (XᵀX)⁻¹ xᵀ, where X holds the centred keys of
    the head in a random projection to `sketch` dimensions; it counts `blend` times. The second is the attention that
    the key receives from all queries of its own block of `block` tokens, also from earlier ones, with logits that are
    not divided by √D, times its value's norm, averaged over three neighbours.

    As in kvpress, `blend` is by default the share of tokens that are evicted, and 0.01 is added to the diagonal of
    XᵀX. Deviation: a last block that is not full has no padding, where kvpress lets padded queries attend to it.

    sink    first tokens that always stay
    recent  last tokens that always stay
    block   tokens in a block
    sketch  dimensions of the projection
    blend   how much the leverage counts; none: the share of tokens that are evicted
    seed    of the projection
    """

    sink: int = 8
    recent: int = 4
    block: int = 256
    sketch: int = 48
    blend: float | None = None
    seed: int = 0

    def __post_init__(self):
        if min(self.sink, self.recent, self.seed) < 0 or min(self.block, self.sketch) < 1:
            raise ValueError(
                f"compactor:sink={self.sink},recent={self.recent},block={self.block},sketch={self.sketch},"
                f"seed={self.seed} is out of range; block and sketch ≥ 1, the others ≥ 0"
            )
        if self.blend is not None and self.blend < 0:
            raise ValueError(f"compactor:blend={self.blend}; give 0 or more, or none")
        if self.every:
            raise ValueError(f"compactor:every={self.every}: it scores a whole prompt only; use every=0")
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(block=self.block, block_edges=(self.sink, self.recent))

    @property
    def min_budget(self) -> int:
        return max(1, self.sink + self.recent)

    def score(self, p: Prompt) -> Tensor:
        a = int(p.sinks(self.sink)[0, 0].sum())
        b = max(a, len(p) - self.recent)  # the tokens a … b−1 are scored
        if a == b:
            return torch.full(p.pos.shape, torch.inf, device=p.k.device)
        raw = unrotated(p.k[:, :, a:b], p.pos[:, 0, a:b], p.inv_freq)
        attention = p.attention.sum(0, keepdim=True)[..., a:b] * p.v[:, :, a:b].float().norm(dim=-1)
        blend = max(0, 1 - self.layer_budget(p) / len(p)) if self.blend is None else self.blend
        score = blend * standardised(self._leverage(raw)) + standardised(avg_pool1d(attention, 3, 1, 1))
        return pad(score, (a, len(p) - b), value=torch.inf)

    def _leverage(self, k: Tensor) -> Tensor:
        """(1,Hkv,N) of keys k (1,Hkv,N,D)."""
        generator = torch.Generator().manual_seed(self.seed)
        projection = torch.randn(k.shape[1], k.shape[3], self.sketch, generator=generator).to(k.device)
        x = ((k - k.mean(2, keepdim=True)) @ (projection / math.sqrt(self.sketch))).double()
        square = x.mT @ x + 0.01 * torch.eye(self.sketch, dtype=x.dtype, device=x.device)
        return (x * torch.linalg.solve(square, x.mT).mT).sum(-1).clamp(min=0).float()


def standardised(x: Tensor) -> Tensor:
    """x with mean 0 and standard deviation 1 over all heads and tokens."""
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-6)
