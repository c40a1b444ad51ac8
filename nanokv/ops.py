"""Backends: the functions that models and caches compute with, chosen once and passed along as a value.

EAGER is plain torch (`kernels.reference`), the oracle. SDPA is EAGER with attention handed to torch's fused kernels. This is
the only module that imports `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.reference import pack, unpack
from nanokv import forms

__all__ = ["BACKENDS", "EAGER", "SDPA", "Ops", "merge", "pack", "unpack"]


@dataclass(frozen=True)
class Ops:
    """One backend. Signatures of the attention functions: `kernels/reference.py`."""

    name: str
    prefill: Callable[..., Tensor]  # a prompt or a chunk of one: out alone
    turn: Callable[..., tuple[Tensor, Tensor]]  # new tokens among themselves: out and lse, to merge with what is stored
    decode: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    decode_quant: Callable[..., tuple[Tensor, Tensor]]
    decode_ragged: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    mass: Callable[..., Tensor]
    landmarks: Callable[..., Tensor]
    rebuild: Callable[..., None]
    fetch: Callable[..., None]
    compact: Callable[..., tuple[Tensor, Tensor, Tensor]]
    append: Callable[..., None]
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dequantize: Callable[..., Tensor]
    norm: Callable[[Tensor, Tensor, float], Tensor]  # (x (…,C), weight (C,), eps) → (…,C)
    add_norm: Callable[
        [Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]
    ]  # (x, delta, weight, eps) → x + delta, its norm
    swiglu: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x (…,C), weight (N,C), bias (N,)) → (…,N)
    reads: Callable[[torch.dtype], bool] = lambda kind: (
        False
    )  # whether `decode` takes keys and values of this 8-bit type


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim; x and weight fp32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + delta
    return x, norm(x, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…,C) in any type, computed and returned in the weight's."""
    if _fused(x) and weight.itemsize == 2 and x.numel() == x.shape[-1]:
        return forms.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight, bias)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, but one row goes to the matrix-vector routine: on some CPUs it streams bf16 weights up to twice as fast."""
    if x.numel() != x.shape[-1] or _fused(x):
        return linear(x, weight, bias)
    out = torch.mv(weight, x.to(weight.dtype).reshape(-1))
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def _fused(x: Tensor) -> bool:
    """Whether Inductor is going to make C++ loops of what follows."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def swiglu(gate_up: Tensor) -> Tensor:
    """(…,2C), the gate's half first → (…,C)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def eager_prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> Tensor:
    return reference.prefill(q, k, v, start, sliding_window)[0]


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


MASKED_BLOCK = 512  # queries per masked call: bounds the mask, and under a sliding window the keys read in vain


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
    if _fused(q) and T == 1:
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


def still(move: Callable[..., None]) -> Callable[..., None]:
    """While compiling, everything is fetched again: how many chunks are new is a shape that no graph can have."""

    def moved(*given: Tensor | None) -> None:
        *what, fresh, out = given
        move(*what, None if torch.compiler.is_compiling() else fresh, out)

    return moved


EAGER = Ops(
    "eager",
    eager_prefill,
    reference.prefill,
    reference.decode,
    reference.decode_quant,
    reference.decode_ragged,
    reference.mass,
    reference.landmarks,
    reference.rebuild,
    still(reference.fetch),
    reference.compact,
    reference.append,
    reference.quantize,
    reference.dequantize,
    norm,
    add_norm,
    swiglu,
    linear,
)
SDPA = replace(
    EAGER,
    name="sdpa",
    prefill=sdpa_prefill,
    decode=sdpa_decode,
    decode_quant=sdpa_decode_quant,
    decode_ragged=reference.each_head(sdpa_decode),
)
BACKENDS = {"eager": EAGER, "sdpa": SDPA}


def triton() -> Ops:
    """SDPA with the kernels of `kernels/` for what they are made for: single tokens in 16 bits, and the votes of a prompt's last ones.

    Torch does the rest: several tokens at once, noise, fp32 (exact products spill there), and codes in groups or runs that fit no tile.
    """
    import kernels

    def decode(q, k, v, length, kpos, now, sliding_window, group=None, noise=None):
        if _suits(q) and q.shape[2] == 1 and noise is None:
            return kernels.decode(q, k, v, length, kpos, now, sliding_window, group)
        return sdpa_decode(q, k.to(q.dtype), v.to(q.dtype), length, kpos, now, sliding_window, group, noise)

    def reads(kind):  # before compute capability 8.9 no instruction turns e4m3 into anything
        old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
        return kind == torch.float8_e5m2 or not old

    def decode_quant(q, k, v, length, kpos, now, sliding_window, bits, near=None):
        group, runs = k[0].shape[2] // k[1].shape[2], v[1].shape[3]
        fits = 4 % runs == 0 and 3 not in bits and group & -group >= 16 and q.shape[3] % 4 == 0 and q.shape[3] > 32
        use = kernels.decode_quant if _suits(q) and q.shape[2] == 1 and fits else sdpa_decode_quant
        return use(q, k, v, length, kpos, now, sliding_window, bits, near)

    def decode_ragged(q, k, v, spans, first, length, kpos, now, sliding_window, group=None, noise=None):
        fits = _suits(q) and q.shape[2] == 1 and noise is None and any(n for _, n in spans)
        use = kernels.decode_ragged if fits else SDPA.decode_ragged
        return use(q, k, v, spans, first, length, kpos, now, sliding_window, group, noise)

    def landmarks(q, marks, seen):
        return (kernels.landmarks if _suits(q) else reference.landmarks)(q, marks, seen)

    def rebuild(a, b, inv_freq, first, ids, fresh, out):
        (kernels.rebuild if _moves(a) else reference.rebuild)(a, b, inv_freq, first, ids, fresh, out)

    def fetch(chunks, ids, fresh, out):
        (kernels.fetch if _moves(out) else still(reference.fetch))(chunks, ids, fresh, out)

    def compact(k, v, pos, at):
        straight = k.stride(3) == v.stride(3) == pos.stride(2) == 1
        return (kernels.compact if straight and _moves(k) else reference.compact)(k, v, pos, at)

    def append(k, v, row, keys, values):
        straight = k.stride(3) == v.stride(3) == 1 and k.shape == v.shape and k.dtype == keys.dtype
        (kernels.append if straight and _moves(k) else reference.append)(k, v, row, keys, values)

    def quantize(x, bits, tokens, channels):
        D = x.shape[-1]
        fits = bits != 3 and 1 in (tokens, channels) and D >= 16 and D & D - 1 == 0 and tokens <= 128 and _moves(x)
        return (kernels.quantize if fits else reference.quantize)(x, bits, tokens, channels)

    def mass(q, k, start, sliding_window, group, stat="sum", noise=None):
        use = kernels.mass if _suits(q) and stat == "sum" and noise is None and q.shape[2] <= 128 else reference.mass
        return use(q, k, start, sliding_window, group, stat, noise)

    def row(x, weight, bias):
        return (kernels.linear if x.numel() == x.shape[-1] else linear)(x, weight, bias)

    rows = {"norm": kernels.norm, "add_norm": kernels.add_norm, "swiglu": kernels.swiglu, "linear": row}
    moves = {"compact": compact, "append": append, "quantize": quantize}
    chunks = {"landmarks": landmarks, "rebuild": rebuild, "fetch": fetch}
    reads = {
        "decode": decode,
        "decode_quant": decode_quant,
        "decode_ragged": decode_ragged,
        "mass": mass,
        "reads": reads,
    }
    return replace(SDPA, name="triton", **reads, **moves, **chunks, **rows)


def _suits(q: Tensor) -> bool:
    """In the interpreter everything but bf16 does, which it computes wrongly."""
    return q.itemsize == 2 if q.device.type == "cuda" else q.dtype != torch.bfloat16


def _moves(x: Tensor) -> bool:
    """The interpreter has no bf16 to copy."""
    return x.device.type == "cuda" or x.dtype != torch.bfloat16


def merge(states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(out (B,H,T,D), lse (B,H,T))] over disjoint sets of keys → the same over their union."""
    lse = torch.stack([s[1] for s in states]).logsumexp(0)
    least = lse.masked_fill(lse.isneginf(), 0)  # where nothing at all is seen
    out = sum(o.float() * (l - least).exp()[..., None] for o, l in states)
    return out.to(states[0][0].dtype), lse
