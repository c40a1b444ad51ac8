"""Which attention statistics a policy asks for, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOMENT_QUERIES = 128  # last queries of which a rescore takes the moments


@dataclass(frozen=True)
class ScoreRequest:
    """A request: the statistics of attention that a policy wants. `attention_scores` in kernels/reference.py shows how the
    scores are computed, for every policy.

    last_queries    how many of the prompt's last queries score the keys (the observation window). None: all; 0: none.
    over_group      how the scores of the G query heads of a KV head are reduced to one: mean or max.
    over_queries    how the scores of a head's queries are reduced to one. sum: the attention that a key received.
                    rising: the same, but the last query counts 1.2 times as much as the first one.
                    count_low: how many queries gave the key less than an even share of their attention.
                    last_hit: 1 + the position of the last query that gave it at least an even share; 0 if none did.
                    max: the most attention that one query gave to the key.
    near            if given, only queries that stand fewer than so many tokens behind a key count for it. For a sum.
    gumbel_seed     if given, the softmax is taken of (logits + Gumbel noise) / temperature.
    query_moments   if given, mean and covariance of the unrotated queries are computed, and the mean length of each pair
                    of channels; this many first queries of the text are left out.
    block           if given, the text is cut into blocks of so many tokens, and the queries of a block score its keys, also
                    those behind them, by the softmax of logits that are not divided by √D. Nothing else is scored then.
    block_edges     how many first and last tokens of the text lie in no block.
    output_weights  whether the policy gets the output projection, to measure |W_o v|.
    """

    last_queries: int | None = 0
    over_group: str = "mean"
    over_queries: str = "sum"
    near: int | None = None
    gumbel_seed: int | None = None
    temperature: float = 1.0
    query_moments: int | None = None
    block: int | None = None
    block_edges: tuple[int, int] = (0, 0)
    output_weights: bool = False

    def noise(self, head: int) -> tuple[int, float, int] | None:
        """The noise as `Ops` takes it, for a call whose first query head is `head`: (seed, temperature, head)."""
        return None if self.gumbel_seed is None else (self.gumbel_seed, self.temperature, head)

    @property
    def buffered_queries(self) -> int:
        """How many of the last queries a cache must keep to score again while decoding."""
        return self.last_queries or (0 if self.query_moments is None else MOMENT_QUERIES)

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        """Scores of the same keys from two disjoint sets of queries."""
        return old.maximum(new) if self.over_queries in ("last_hit", "max") else old + new


QuerySums = tuple[Tensor, Tensor, Tensor, int]  # Σq (1,H,D), Σqqᵀ (1,H,D,D), Σ|q| of pairs (1,H,D/2), queries


def query_sums(raw: Tensor) -> QuerySums:
    """The sums over queries (1,H,T,D) before rotation that `moments` divides by their number."""
    return raw.sum(2), raw.mT @ raw, pair_norms(raw).sum(2), raw.shape[2]


def moments(sums: list[QuerySums]) -> tuple[Tensor, Tensor, Tensor]:
    """Per reading layer its sums → mean (readers,H,D), covariance (readers,H,D,D), mean length of pairs (readers,H,D/2)."""
    mean, square, lengths = (torch.cat([of_layer[i] / of_layer[3] for of_layer in sums]) for i in range(3))
    return mean, square - mean[..., None] * mean[..., None, :], lengths


def pair_norms(x: Tensor) -> Tensor:
    """(…,D) → (…,D/2): the length of each pair of channels that the rotation turns together."""
    return x.unflatten(-1, (2, -1)).norm(dim=-2)


def block_scores(q: Tensor, k: Tensor) -> Tensor:
    """The queries (1,H,n,D) and keys (1,Hkv,n,D) of one block → scores (1,Hkv,n): the sum over the queries, the mean over the
    query heads of a KV head.
    """
    grouped = q.unflatten(1, (k.shape[1], -1)).float()
    return (grouped @ k[:, :, None].float().mT).softmax(-1).sum(3).mean(2)


def rounded(score: Tensor) -> Tensor:
    """Scores in fp32, rounded to 12 bits of mantissa, a relative step of 1/4096.

    The same token has the same key norm at each of its places, but fp32 sums differ in their last bits, and not in the
    same way when the token stands alone or in a batch. Rounded, such scores are equal, and the earlier token wins.
    """
    bits = score.to(torch.float32).view(torch.int32)
    return ((bits + 0x400) & ~0x7FF).view(torch.float32)
