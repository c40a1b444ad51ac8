"""Torch with its fused attention, SDPA, for CPUs. Other devices without CUDA (mps) use it too, without the calls that only a
CPU has. On a CPU a decode step reads each key once, and the codes of `int` stores are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from nanokv.backends import bf16_cpu, inductor_cpu
from nanokv.backends.base import merge
from nanokv.backends.torch_ops import EAGER, compiles_for_cpu, linear

MASKED_BLOCK = 512  # queries per masked call; bounds the mask and the keys read outside a sliding window


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, but one row goes to the matrix-vector routine, which on some CPUs reads bf16 weights up to twice
    as fast.
    """
    if x.numel() != x.shape[-1] or compiles_for_cpu(x):
        return linear(x, weight, bias)
    out = torch.mv(weight, x.to(weight.dtype).reshape(-1))
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, but two to six rows are multiplied as weight @ xᵀ, which on some CPUs takes half the time in fp32."""
    rows = x.numel() // x.shape[-1]
    if not 1 < rows < 7 or compiles_for_cpu(x):
        return linear(x, weight, bias)
    out = (weight @ x.to(weight.dtype).reshape(rows, -1).t()).t().contiguous()
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """torch's flash kernel: every query of q (B,H,T,D) sees every key of k (B,Hkv,S,D), or what `bias`, added to the
    logits, leaves → out, lse (B,H,T) fp32.

    The G query heads of a KV head become G·T queries of one head, so each key is read once.
    """
    (B, H, T, D), heads = q.shape, k.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(B, heads, -1, D), k, v, attn_mask=bias
    )
    return out.reshape(B, H, T, D), lse.reshape(B, H, T)


def causal_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch's flash kernel: q (B,H,T,D) and the keys of the same T tokens, each of which sees those before → out, lse."""
    (B, H, T, D), heads = q.shape, k.shape[1]
    # a token's keys may lie beside its queries, and the kernel reads them again and again, so they are copied together;
    # then a KV head and its query heads: the same keys, with stride 0, for each of them
    k, v = (x.contiguous().flatten(0, 1)[:, None].expand(-1, H // heads, -1, -1) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(B * heads, -1, T, D), k, v, is_causal=True
    )
    return out.reshape(B, H, T, D), lse.reshape(B, H, T)


def sdpa_turn(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """As `reference.prefill`. Where no sliding window hides a key, the keys before the queries need no mask."""
    if q.device.type != "cpu" or (sliding_window is not None and sliding_window < k.shape[2]):
        return reference.prefill(q, k, v, start, sliding_window)
    if bf16_cpu.applies(q, k):
        return bf16_cpu.attend(q, k, v, causal=True)
    own = causal_flash(q, k[:, :, start:], v[:, :, start:])
    return merge([flash(q, k[:, :, :start], v[:, :, :start]), own]) if start else own


def sdpa_prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    """As `reference.prefill` without lse. On a CPU only a sliding window that hides keys needs a mask, elsewhere all but a
    whole prompt does. Masked queries go in blocks.
    """
    T = q.shape[2]
    sees_all = sliding_window is None or sliding_window >= k.shape[2]
    if sees_all and bf16_cpu.applies(q, k):
        return bf16_cpu.attend(q, k, v, causal=True, with_lse=False)[0]
    if sees_all and q.device.type == "cpu":
        return sdpa_turn(q, k, v, start, None)[0]
    if sees_all and not start:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    out = torch.empty_like(q)
    for rows, keys, visible in reference.blocks(T, start, sliding_window, q.device, MASKED_BLOCK):
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=visible, enable_gqa=True
        )
    return out


def attention_scores(
    q: Tensor,
    k: Tensor,
    start: int,
    sliding_window: int | None,
    over_group: str,
    over_queries: str = "sum",
    noise: tuple[int, float, int] | None = None,
    near: int | None = None,
) -> Tensor:
    """As `reference.attention_scores`."""
    how = over_group, over_queries, noise, near
    if not bf16_cpu.applies(q, k):
        return reference.attention_scores(q, k, start, sliding_window, *how)
    block = max(reference.SCORED_AT_ONCE, bf16_cpu.SCORED_ROWS // q.shape[1])
    return reference.attention_scores_by(bf16_cpu.logits, q, k.float(), start, sliding_window, *how, block)


def prefill_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    sliding_window: int | None,
    n: int,
    scored: Sequence[tuple[int, int]] | None,
    over_group: str,
    over_queries: str,
    noise: tuple[int, float, int] | None,
    near: int | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.prefill_scored_by` describes. Where attention is made of products, scores that are the most that one
    query gives are taken from its weights.
    """
    sees_all = sliding_window is None or sliding_window >= k.shape[2]
    if over_group == over_queries == "max" and noise is None and sees_all and bf16_cpu.applies(q, k):
        return bf16_cpu.attend_and_score(q, k, v, n, [(0, n)] if scored is None else scored)
    given = q, k, v, start, sliding_window, n, scored, over_group, over_queries, noise, near
    return reference.prefill_scored_by(sdpa_prefill, attention_scores)(*given)


def sdpa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    over_group: str | None = None,
    noise: tuple[int, float, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.decode`. Without scores, on a CPU: a loop for Inductor while it compiles, products for many bf16 queries,
    else torch's flash kernel.
    """
    H, T = q.shape[1:3]
    masks_differ = sliding_window is not None and T > 1  # each query has its own mask, and this call takes one for all
    if over_group is not None or q.device.type != "cpu" or masks_differ:
        return reference.decode(q, k, v, length, key_pos, query_pos, sliding_window, over_group, noise)
    visible, bias = reference.mask(length, key_pos, query_pos, sliding_window, k.shape[2]), None
    if compiles_for_cpu(q) and T == 1:
        return *inductor_cpu.decode(q, k, v, visible), None
    if visible is not None:
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
    out, lse = bf16_cpu.attend(q, k, v, False, bias) if bf16_cpu.applies(q, k) else flash(q, k, v, bias)
    if visible is not None:  # both give NaN for a query that sees no key
        blind = ~visible.any(-1).expand(-1, -1, T).repeat_interleave(H // k.shape[1], 1)
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)
    return out, lse, None


def sdpa_decode_quant(
    q: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    length: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    bits: tuple[int, int],
    exact: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.decode_quant`. For a single token K's scales are multiplied into the query and V's into the
    attention weights, so the codes are multiplied as they are and neither K nor V ever exists. For several tokens it
    is cheaper to make K and V once.
    """
    if exact is not None:
        out = sdpa_decode(q, *exact, query_pos, sliding_window)[:2]
        return merge([out, sdpa_decode_quant(q, k, v, length, key_pos, query_pos, sliding_window, bits)])
    B, H, T, D = q.shape
    if T > 1 or q.device.type != "cpu":
        k, v = (reference.dequantize(*x, b).to(q.dtype) for x, b in zip((k, v), bits, strict=True))
        return sdpa_decode(q, k, v, length, key_pos, query_pos, sliding_window)[:2]
    (kq, ks, kz), (vq, vs, vz) = k, v
    heads, groups, S, runs = ks.shape[1], ks.shape[2], kq.shape[2], vs.shape[3]
    dots, mix = (inductor_cpu.dots, inductor_cpu.mix) if compiles_for_cpu(q) else (_dots, torch.matmul)
    scaled_q = q.view(B, heads, -1, D).float() * D**-0.5  # (B,Hkv,G,D)
    # the zero points add one number per group
    score = dots(scaled_q, kz.float()).transpose(2, 3)[..., None]  # (B,Hkv,groups,G,1)
    scaled_q = _bytewise(scaled_q[:, :, None] * ks.float()[:, :, :, None], bits[0])
    for channels, codes in _numbers(kq, bits[0]):
        score = score + dots(scaled_q[..., channels], codes.unflatten(2, (groups, -1)))  # (…,G,tokens)
    score = score.transpose(2, 3).flatten(3)  # (B,Hkv,G,S)
    visible = reference.mask(length, key_pos, query_pos, sliding_window, S)
    if visible is not None:
        score = score.masked_fill(~visible, -torch.inf)
    largest = score.amax(-1, keepdim=True)
    weight = score.sub_(largest.masked_fill(largest.isneginf(), 0)).exp_()
    total = weight.sum(-1, keepdim=True)
    # V has a scale per run of channels: multiply the weights by each scale, then take each run's channels from its
    # own product
    scaled = (weight[:, :, None] * vs.float().transpose(2, 3)[:, :, :, None]).flatten(2, 3)  # (B,Hkv,runs·G,S)
    part = _channelwise(torch.cat([mix(scaled, codes) for _, codes in _numbers(vq, bits[1])], -1), bits[1])
    part = part.unflatten(2, (runs, -1)).unflatten(4, (runs, -1)).diagonal(0, 2, 4)  # (B,Hkv,G,D/runs,runs)
    out = (part.transpose(3, 4) + mix(weight, vz.float())[..., None]).flatten(3) / total.masked_fill(total == 0, 1)
    return out.reshape(B, H, T, D).to(q.dtype), (largest + total.log()).view(B, H, T)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.transpose(-1, -2)


def _numbers(words: Tensor, bits: int) -> list[tuple[slice, Tensor]]:
    """Packed words as numbers, one pair per field of a byte: (the channels, in the order of `_bytewise`, and their
    codes (B,Hkv,S,·) fp32).
    """
    if bits == 8:
        return [(slice(None), words.float())]
    octets, n = words.view(torch.uint8), words.shape[-1] * words.itemsize
    fields = [octets & 2**bits - 1, *(octets >> shift & 2**bits - 1 for shift in range(bits, 8 - bits, bits))]
    return [(slice(i * n, (i + 1) * n), x.float()) for i, x in enumerate([*fields, octets >> 8 - bits])]


def _bytewise(x: Tensor, bits: int) -> Tensor:
    """Channels (…,D) in the order in which the bytes of packed words hold them: a 4-bit word has fields 0 and 1 in
    one byte, 2 and 3 in the other.
    """
    if bits != 4:
        return x
    return x.unflatten(-1, (2, 2, -1)).permute(*range(x.dim() - 1), -2, -1, -3).flatten(-3)


def _channelwise(x: Tensor, bits: int) -> Tensor:
    """The inverse of `_bytewise`."""
    if bits != 4:
        return x
    return x.unflatten(-1, (2, -1, 2)).permute(*range(x.dim() - 1), -1, -3, -2).flatten(-3)


SDPA = replace(
    EAGER,
    name="sdpa",
    prefill=sdpa_prefill,
    prefill_scored=prefill_scored,
    turn=sdpa_turn,
    decode=sdpa_decode,
    decode_quant=sdpa_decode_quant,
    attention_scores=attention_scores,
    decode_ragged=reference.each_head(sdpa_decode),
)
