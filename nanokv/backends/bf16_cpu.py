"""Attention of several queries on a CPU with bf16 arithmetic, as products of matrices.

torch's flash kernel for CPUs multiplies bf16 as slowly as fp32, unless the CPU has AMX. oneDNN's products of matrices are
faster: on a Zen 5 four times as fast in bf16, and twice in fp32. So the logits of a block of queries are written to
memory. Up to some 8,192 keys a CPU's cache holds them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

ROWS = 512  # queries of one block times the query heads of a group. With 4,096 keys logits and weights take 12 MiB
SCORED_ROWS = 384  # queries of one block times all query heads, where attention scores are taken
MIN_LOGITS = 200_000  # of one KV head. With fewer the calls cost more than the flash kernel
SETTING = threading.Lock()  # for `fp32_by_onednn`, whose setting all threads share


def applies(q: Tensor, k: Tensor) -> bool:
    """Whether `attend` and `logits` take q and k and are faster here than torch's flash kernel. The two have not been
    timed with AMX, whose tiles the flash kernel uses.
    """
    (_, H, T, _), (heads, S) = q.shape, k.shape[1:3]
    many = T > 1 and H // heads * T * S >= MIN_LOGITS
    bf16 = q.device.type == "cpu" and q.dtype == k.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return many and bf16 and not torch.cpu._is_amx_tile_supported() and not torch.compiler.is_compiling()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    bias: Tensor | None = None,
    with_lse: bool = True,
    on_weights: Callable[[int, int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q (B,H,T,D), k and v (B,Hkv,S,D), all bf16 → out (B,H,T,D) bf16, and lse (B,H,T) fp32 if asked for.

    causal: the queries are the last T of the S tokens, and each sees the tokens up to its own; else each sees all. bias
    (B,Hkv,1,S) is added to the logits. A query that sees no key gets NaN. Logits and softmax are fp32.
    on_weights(row, KV head, weights) is called after each block of queries. weights (queries · G, keys) fp32: of the keys
    from the first to the last that any of these queries sees. It may overwrite them.
    """
    (B, H, T, D), (heads, S) = q.shape, k.shape[1:3]
    G, start = H // heads, S - T
    n = min(T, max(1, ROWS // G))
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32) if with_lse else None
    # memory for one block, used again and again: new memory would cost more than what is computed in it
    logits, weights = q.new_empty(G * n * S, dtype=torch.float32), q.new_empty(G * n * S)
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    for b, h in product(range(B), range(heads)):
        group = slice(h * G, (h + 1) * G)
        keys, values = k[b, h].float().t(), v[b, h].contiguous()
        queries, found = q[b, group].transpose(0, 1).float().reshape(T * G, D), out[b, group].transpose(0, 1)
        for i in range(0, T, n):
            m = min(n, T - i)
            end = start + i + m if causal else S  # keys that any of these queries sees
            x, weight = logits[: G * m * end].view(G * m, end), weights[: G * m * end].view(G * m, end)
            with fp32_by_onednn():
                torch.addmm(x, queries[i * G : (i + m) * G], keys[:, :end], beta=0, alpha=D**-0.5, out=x)
            if causal:
                x.view(m, G, end)[..., start + i :].masked_fill_(later[:m, None, :m], -torch.inf)
            if bias is not None:
                x += bias[b, h]
            largest = x.amax(-1) if with_lse else None
            torch.softmax(x, -1, out=x)
            if with_lse:  # the largest weight is exp(largest logit − lse)
                lse[b, group, i : i + m] = (largest - x.amax(-1).log()).view(m, G).t()
            found[i : i + m] = (weight.copy_(x) @ values[:end]).view(m, G, D)
            if on_weights is not None:
                on_weights(b, h, x)
    return out, lse


def attend_and_score(
    q: Tensor, k: Tensor, v: Tensor, n: int, scored: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Causal attention of a scoring pass, all bf16 → out (B,H,T,D) bf16, scores (B,Hkv,n) fp32.

    The keys from n on are the pass's own. A key's score is the largest share that one query of its group gives it of the
    weight on the keys of the runs `scored` and on the pass's own. fp32 holds no weight below e⁻⁸⁷ of all that a query
    gives; the share of such a key comes out too small.
    """
    scores = q.new_zeros(*k.shape[:2], n, dtype=torch.float32)

    def add(b: int, h: int, weight: Tensor) -> None:
        parts = [weight[:, first:end] for first, end in (*scored, (n, weight.shape[1]))]
        total = sum(part.sum(-1, keepdim=True) for part in parts).clamp_min_(torch.finfo(torch.float32).tiny)
        for (first, end), part in zip(scored, parts[:-1], strict=True):
            if first < end:
                most = scores[b, h, first:end]
                torch.maximum(most, part.div_(total).amax(0), out=most)

    return attend(q, k, v, True, with_lse=False, on_weights=add)[0], scores


def logits(q: Tensor, k: Tensor) -> Tensor:
    """q (B,H,T,D) bf16, k (B,Hkv,S,D) in fp32, with numbers that bf16 can hold → q·k/√D, (B,Hkv,G,T,S) fp32."""
    (B, H, T, D), (heads, S) = q.shape, k.shape[1:3]
    x, queries = q.new_empty(B * heads, H // heads * T, S, dtype=torch.float32), q.float().reshape(B * heads, -1, D)
    with fp32_by_onednn():
        for out, rows, keys in zip(x, queries, k.flatten(0, 1), strict=True):  # a batched product would copy the keys
            torch.addmm(out, rows, keys.t(), beta=0, alpha=D**-0.5, out=out)
    return x.view(B, heads, -1, T, S)


@contextmanager
def fp32_by_onednn() -> Iterator[None]:
    """Within this, oneDNN multiplies fp32 matrices instead of MKL, which takes twice as long on a Zen 5. torch has no
    product on a CPU that takes bf16 and returns fp32. The setting allows oneDNN to round to bf16, which changes no number
    that bf16 can hold; without AMX it was not seen to round. It is the whole process's: products of other threads go to
    oneDNN meanwhile, too.
    """
    matmul = torch.backends.mkldnn.matmul
    with SETTING:
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = "bf16"
            yield
        finally:
            matmul.fp32_precision = before
