"""Torch with its fused attention: SDPA. On the CPU a decode step reads each key once and never makes K or V out of codes."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from nanokv.backends import inductor_cpu as forms
from nanokv.backends.base import merge
from nanokv.backends.torch_ops import EAGER, fused, linear


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, but one row goes to the matrix-vector routine: on some CPUs it streams bf16 weights up to twice as fast."""
    if x.numel() != x.shape[-1] or fused(x):
        return linear(x, weight, bias)
    out = torch.mv(weight, x.to(weight.dtype).reshape(-1))
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


MASKED_BLOCK = 512  # queries per masked call: bounds the mask, and under a sliding window the keys read in vain


def sdpa_prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    """As `reference.prefill` without lse. A whole prompt is one causal call; chunks and windows go in blocks of queries."""
    T = q.shape[2]
    if start == 0 and (sliding_window is None or sliding_window >= T):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    out = torch.empty_like(q)
    for rows, keys, seen in reference.blocks(T, start, sliding_window, q.device, MASKED_BLOCK):
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=seen, enable_gqa=True
        )
    return out


def sdpa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None,
    kpos: Tensor,
    now: Tensor,
    sliding_window: int | None,
    group: str | None = None,
    noise: tuple[int, float, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.decode`. On the CPU by torch's flash kernel, which also returns lse; it has no votes.

    The G query heads of a KV head become G·T queries of one head, so each key is read once.
    """
    B, H, T, D = q.shape
    masks_differ = sliding_window is not None and T > 1  # from query to query, for which this call has no room
    if group is not None or q.device.type != "cpu" or masks_differ:
        return reference.decode(q, k, v, length, kpos, now, sliding_window, group, noise)
    if fused(q) and T == 1:
        return *forms.decode(q, k, v, reference.mask(length, kpos, now, sliding_window, k.shape[2])), None
    bias = None
    seen = reference.mask(length, kpos, now, sliding_window, k.shape[2])
    if seen is not None:
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(B, k.shape[1], -1, D), k, v, attn_mask=bias
    )
    out, lse = out.reshape(B, H, T, D), lse.reshape(B, H, T)
    if seen is not None:  # torch's kernel has no answer for a query that sees nothing
        none = ~seen.any(-1).expand(-1, -1, T).repeat_interleave(H // k.shape[1], 1)
        out, lse = out.masked_fill(none[..., None], 0), lse.masked_fill(none, -torch.inf)
    return out, lse, None


def sdpa_decode_quant(
    q: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    length: Tensor | None,
    kpos: Tensor,
    now: Tensor,
    sliding_window: int | None,
    bits: tuple[int, int],
    near: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.decode_quant`. A single token's query takes K's scales and its weights take V's, so the codes are multiplied as
    they are and neither K nor V ever exists; more queries than that are cheaper served by keys and values made once.
    """
    if near is not None:
        exact_k, exact_v, held, pos = near
        exact = sdpa_decode(q, exact_k, exact_v, held, pos, now, sliding_window)[:2]
        return merge([exact, sdpa_decode_quant(q, k, v, length, kpos, now, sliding_window, bits)])
    B, H, T, D = q.shape
    if T > 1 or q.device.type != "cpu":
        k, v = (reference.dequantize(*x, b).to(q.dtype) for x, b in zip((k, v), bits, strict=True))
        return sdpa_decode(q, k, v, length, kpos, now, sliding_window)[:2]
    (kq, ks, kz), (vq, vs, vz) = k, v
    heads, groups, S, runs = ks.shape[1], ks.shape[2], kq.shape[2], vs.shape[3]
    state = q.view(B, heads, -1, D).float() * D**-0.5  # (B,Hkv,G,D)
    score = (kz.float() @ state.transpose(2, 3))[..., None]  # (B,Hkv,groups,G,1): the zeros add one number per group
    state = _bytewise(state[:, :, None] * ks.float()[:, :, :, None], bits[0])
    for channels, codes in _numbers(kq, bits[0]):
        score = score + state[..., channels] @ codes.unflatten(2, (groups, -1)).transpose(3, 4)  # (…,G,tokens)
    score = score.transpose(2, 3).flatten(3)  # (B,Hkv,G,S)
    seen = reference.mask(length, kpos, now, sliding_window, S)
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    top = score.amax(-1, keepdim=True)
    weight = score.sub_(top.masked_fill(top.isneginf(), 0)).exp_()
    total = weight.sum(-1, keepdim=True)
    # where runs of channels have a scale each: the weights times every one of them, and of the products each run's own
    scaled = (weight[:, :, None] * vs.float().transpose(2, 3)[:, :, :, None]).flatten(2, 3)  # (B,Hkv,runs·G,S)
    part = _channelwise(torch.cat([scaled @ codes for _, codes in _numbers(vq, bits[1])], -1), bits[1])
    part = part.unflatten(2, (runs, -1)).unflatten(4, (runs, -1)).diagonal(0, 2, 4)  # (B,Hkv,G,D/runs,runs)
    out = (part.transpose(3, 4) + (weight @ vz.float())[..., None]).flatten(3) / total.masked_fill(total == 0, 1)
    return out.reshape(B, H, T, D).to(q.dtype), (top + total.log()).view(B, H, T)


def _numbers(words: Tensor, bits: int) -> list[tuple[slice, Tensor]]:
    """Codes of packed words as numbers: (which channels, in the order of `_bytewise`; (B,Hkv,S,·) fp32), one for each field of a byte."""
    if bits == 8:
        return [(slice(None), words.float())]
    octets, n = words.view(torch.uint8), words.shape[-1] * words.itemsize
    fields = [octets & 2**bits - 1, *(octets >> shift & 2**bits - 1 for shift in range(bits, 8 - bits, bits))]
    return [(slice(i * n, (i + 1) * n), x.float()) for i, x in enumerate([*fields, octets >> 8 - bits])]


def _bytewise(x: Tensor, bits: int) -> Tensor:
    """Channels (…,D) as the bytes of packed words hold them. Of 4-bit words, int16, one byte has fields 0 and 1, the other 2 and 3."""
    if bits != 4:
        return x
    return x.unflatten(-1, (2, 2, -1)).permute(*range(x.dim() - 1), -2, -1, -3).flatten(-3)


def _channelwise(x: Tensor, bits: int) -> Tensor:
    """… and back."""
    if bits != 4:
        return x
    return x.unflatten(-1, (2, -1, 2)).permute(*range(x.dim() - 1), -1, -3, -2).flatten(-3)


SDPA = replace(
    EAGER,
    name="sdpa",
    prefill=sdpa_prefill,
    decode=sdpa_decode,
    decode_quant=sdpa_decode_quant,
    decode_ragged=reference.each_head(sdpa_decode),
)
