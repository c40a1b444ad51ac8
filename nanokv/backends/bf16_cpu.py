"""Attention of several queries on a CPU with bf16 arithmetic, as products of matrices.

torch's flash kernel for CPUs multiplies bf16 as slowly as fp32, unless the CPU has AMX. oneDNN's products of bf16 matrices
are some four times as fast, so the logits of a block of queries are written to memory. Up to some 8,192 keys a CPU's cache
holds them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

ROWS = 512  # queries of one block times the query heads of a group. With 4,096 keys logits and weights take 12 MiB
SCORED_ROWS = 384  # queries of one block times all query heads, where attention scores are taken
MIN_LOGITS = 200_000  # of one KV head. With fewer the calls cost more than the flash kernel
SETTING = threading.Lock()  # for `fp32_as_bf16`, whose setting all threads share


def applies(q: Tensor, k: Tensor) -> bool:
    """Whether `attend` and `logits` take q and k and are faster here than torch's flash kernel. The two have not been
    timed with AMX, whose tiles the flash kernel uses.
    """
    (_, H, T, _), (heads, S) = q.shape, k.shape[1:3]
    many = T > 1 and H // heads * T * S >= MIN_LOGITS
    bf16 = q.device.type == "cpu" and q.dtype == k.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return many and bf16 and not torch.cpu._is_amx_tile_supported() and not torch.compiler.is_compiling()


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None = None, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """q (B,H,T,D), k and v (B,Hkv,S,D), all bf16 → out (B,H,T,D) bf16, and lse (B,H,T) fp32 if asked for.

    causal: the queries are the last T of the S tokens, and each sees the tokens up to its own; else each sees all. bias
    (B,Hkv,1,S) is added to the logits. A query that sees no key gets NaN. Logits and softmax are fp32.
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
        for i in range(0, T, n):
            block, m = slice(i, i + n), min(n, T - i)
            end = start + i + m if causal else S  # keys that any of these queries sees
            x, weight = logits[: G * m * end].view(G * m, end), weights[: G * m * end].view(G * m, end)
            with fp32_as_bf16():
                queries = q[b, group, block].float().reshape(G * m, D)
                torch.addmm(x, queries, keys[:, :end], beta=0, alpha=D**-0.5, out=x)
            if causal:
                x.view(G, m, end)[..., start + i :].masked_fill_(later[:m, :m], -torch.inf)
            if bias is not None:
                x += bias[b, h]
            largest = x.amax(-1) if with_lse else None
            torch.softmax(x, -1, out=x)
            if with_lse:  # the largest weight is exp(largest logit − lse)
                lse[b, group, block] = (largest - x.amax(-1).log()).view(G, m)
            out[b, group, block] = (weight.copy_(x) @ values[:end]).view(G, m, D)
    return out, lse


def logits(q: Tensor, k: Tensor) -> Tensor:
    """q (B,H,T,D) bf16, k (B,Hkv,S,D) in fp32, with numbers that bf16 can hold → q·k/√D, (B,Hkv,G,T,S) fp32."""
    (B, H, T, D), (heads, S) = q.shape, k.shape[1:3]
    x, queries = q.new_empty(B * heads, H // heads * T, S, dtype=torch.float32), q.float().reshape(B * heads, -1, D)
    with fp32_as_bf16():
        for out, rows, keys in zip(x, queries, k.flatten(0, 1), strict=True):  # a batched product would copy the keys
            torch.addmm(out, rows, keys.t(), beta=0, alpha=D**-0.5, out=out)
    return x.view(B, heads, -1, T, S)


@contextmanager
def fp32_as_bf16() -> Iterator[None]:
    """Within this, oneDNN multiplies fp32 matrices as bf16, which changes no number that bf16 can hold, and adds up in
    fp32. torch has no product on a CPU that takes bf16 and returns fp32. The setting is the whole process's: fp32 products
    of other threads are rounded meanwhile, too.
    """
    matmul = torch.backends.mkldnn.matmul
    with SETTING:
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = "bf16"
            yield
        finally:
            matmul.fp32_precision = before
