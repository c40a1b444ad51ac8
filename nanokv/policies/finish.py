"""What may follow any scorer's choice: the values that stay take over a part of what was evicted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import rounded

REFIT_QUERIES = 32  # for whose outputs values are refitted
RIDGE = 0.01
SIMILARITY_BLOCK = 1024  # tokens whose similarities to all kept keys of a head exist at once


def merged(p: Prompt, kept: Kept) -> Kept:
    """Each evicted token's value is averaged into that of the kept token whose key has the most similar direction.

    It counts cos · |v| / (|v| + |v'|), where cos is the similarity of the keys, v its own value and v' the kept one; the
    kept value counts 1, and negative similarities count 0. This is kvpress's MergingPress with its defaults, after D2O
    (Wan et al. 2024, arXiv:2406.13035, §3.3). The sums are fp32 at least.
    """
    index, valid = _index(p, kept)
    evicted = torch.ones_like(p.pos, dtype=torch.bool).scatter(2, index, False)
    exact = torch.promote_types(kept.v.dtype, torch.float32)
    keys, norms = normalize(kept.k.to(exact), dim=-1), kept.v.to(exact).norm(dim=-1)
    total, weights = torch.zeros_like(kept.v, dtype=exact), torch.zeros_like(norms)
    for h, a in itertools.product(range(p.k.shape[1]), range(0, len(p), SIMILARITY_BLOCK)):
        part = slice(a, a + SIMILARITY_BLOCK)
        k, v = p.k[0, h, part].to(exact), p.v[0, h, part].to(exact)
        similarities = (normalize(k, dim=-1) @ keys[0, h].T).masked_fill(~valid[0, h], -2)  # (·,n)
        target = rounded(similarities).argmax(-1, keepdim=True)  # among equal ones the earlier token
        similarity, norm = similarities.gather(1, target), v.norm(dim=-1, keepdim=True)
        share = norm / (norm + norms[0, h, target]).clamp(min=1e-8)
        weight = similarity.clamp(min=0) * share * evicted[0, h, part, None]
        to = torch.zeros_like(similarities).scatter_(1, target, weight)
        weights[0, h] += to.sum(0)
        total[0, h] += to.T @ v
    v = (kept.v.to(exact) + total) / (1 + weights)[..., None]
    return replace(kept, v=v.to(kept.v.dtype))


def refitted(p: Prompt, kept: Kept) -> Kept:
    """The kept values V' for which the observation queries' outputs change least: they minimise
    |A V' − softmax(QKᵀ)V|² + λ|V' − V|², where A is the attention over the kept keys only (Attention Matching, Zweiger et
    al. 2026, arXiv:2602.16284). λ is RIDGE times the mean of AAᵀ's diagonal. All in fp64, because
    small differences between similar rows of A count.

    The queries of all heads and layers that read a KV head count. Deviations: the prompt's own last queries are used, no
    bias is fitted to the logits, and the ridge draws towards the old values, not towards zero.
    """
    index, valid = _index(p, kept)
    heads, dim = p.k.shape[1], p.k.shape[3]
    q = p.queries.double().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)  # (Hkv, readers·G, w, D)
    q_pos = torch.arange(p.seen - q.shape[2], p.seen, device=q.device)
    v = kept.v.double()
    for h in range(heads):
        logits = (q[h] @ p.k[0, h].double().T) / math.sqrt(dim)
        logits = logits.masked_fill(p.pos[0, h] > q_pos[:, None], -torch.inf).flatten(0, 1)  # (queries, N)
        of_kept = logits[:, index[0, h]].masked_fill(~valid[0, h], -torch.inf)
        sees = (of_kept > -torch.inf).any(-1)  # a query that sees no kept key has no output to keep
        a = of_kept[sees].softmax(-1)
        missing = logits[sees].softmax(-1) @ p.v[0, h].double() - a @ v[0, h]
        square = a @ a.T
        square.diagonal().add_(RIDGE * square.diagonal().mean())
        v[0, h] += a.T @ torch.linalg.solve(square, missing)
    return replace(kept, v=v.to(kept.v.dtype))


def _index(p: Prompt, kept: Kept) -> tuple[Tensor, Tensor]:
    """(1,Hkv,n): where the kept tokens stand among the prompt's, and which of them are no padding."""
    valid = kept.pos >= 0
    first = p.pos[:, :, :1]
    index = (kept.pos - first).long()
    return torch.where(valid, index, index[:, :, :1].clamp(min=0)), valid
