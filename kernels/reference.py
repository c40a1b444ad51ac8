"""Attention over compressed caches in plain torch: the oracle of every kernel, and the eager backend.

Written to be read and to be right: scores and softmax in fp32, nothing clever. Shapes: q (B,H,T,D); k, v (B,Hkv,S,D); the G = H/Hkv
query heads of one KV head lie next to each other, so `q.view(B, Hkv, G, T, D)` pairs them with their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """Causal attention of the tokens start … start+T−1 over the tokens 0 … S−1 of the same text.

    q (B,H,T,D), k and v (B,Hkv,S,D), S = start+T → out (B,H,T,D) in q's dtype, lse (B,H,T) fp32. sliding_window W: token i sees
    i−W+1 … i. Works in blocks of queries, so no T×S matrix of a long text exists at once.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for rows, keys, seen in blocks(q.shape[2], start, sliding_window, q.device):
        score = _scores(q[:, :, rows], k[:, :, keys]).masked_fill(~seen, -torch.inf)  # (B,Hkv,G,t,s)
        lse[:, :, rows] = score.logsumexp(-1).flatten(1, 2)
        out[:, :, rows] = _values(score.softmax(-1), v[:, :, keys]).to(q.dtype)
    return out, lse


def decode(
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
    """Attention of new tokens over everything stored before them; every stored token that the model may see is seen.

    q (B,H,T,D), k and v (B,Hkv,S,D), length (B,Hkv): how many slots of each head are valid, or bool (B,Hkv,S) which, or None if all S
    are; kpos (B,Hkv,S) and now (B,T): absolute positions, only read under a sliding window W (visible: kpos > now − W).
    group mean | max | each: also return the votes, the attention each slot received from the query heads of its KV head, or, each,
    from every one alone (B,H,S); `noise` as for `mass`.
    → out (B,H,T,D) in q's dtype, lse (B,H,T) fp32 natural log of the summed exponentials (−inf and out 0 where
    nothing is visible), votes (B,Hkv,S) fp32 summed over T, or None.
    """
    score = _scores(q, k)  # (B,Hkv,G,T,S)
    seen = mask(length, kpos, now, sliding_window, k.shape[2])
    if seen is not None:
        score = score.masked_fill(~seen[:, :, None], -torch.inf)
    lse = score.logsumexp(-1)
    weight = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    votes = None
    if group is not None:
        heard = weight if noise is None else _noisy(score, noise, now[:, None, None, :, None], kpos[:, :, None, None])
        votes = _group(heard.sum(3), group)
    return _values(weight, v).to(q.dtype), lse.flatten(1, 2), votes


def each_head(decode: Callable) -> Callable:
    """This `decode` over heads of different lengths, one after the other."""

    def decode_ragged(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Sequence[tuple[int, int]],
        first: Tensor,
        length: Tensor | None,
        kpos: Tensor,
        now: Tensor,
        sliding_window: int | None,
        group: str | None = None,
        noise: tuple[int, float, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`decode` over k, v (slots,D) and kpos (slots,), one (row, KV head)'s slots behind the other's. spans: what the host knows of
        each, its first slot and how many to look at; first (B,Hkv): the same first slots on the device; length (B,Hkv): how many are
        valid, None: all that are looked at. → as `decode`, votes (B,Hkv|H,S) with S of the longest.
        """
        heads, parts = len(spans) // q.shape[0], []
        G, most = q.shape[1] // heads, max(n for _, n in spans)
        for i, (a, n) in enumerate(spans):
            b, h = divmod(i, heads)
            row, mine = slice(b, b + 1), slice(h * G, (h + 1) * G)
            asked, valid = q[row, mine], None if length is None else length[row, h : h + 1]
            if n == 0:
                heard = asked.new_zeros(1, G if group == "each" else 1, 0, dtype=torch.float32)
                empty = torch.full(asked.shape[:3], -torch.inf, device=q.device)
                parts.append((torch.zeros_like(asked), empty, heard))
                continue
            stored = (x[None, None, a : a + n] for x in (k, v))
            chance = None if noise is None else (*noise[:2], noise[2] + h * G)
            when = kpos[None, None, a : a + n]
            parts.append(decode(asked, *stored, valid, when, now[row], sliding_window, group, chance))
        out, lse = (torch.cat([p[j] for p in parts], 1).view(*q.shape[:2], *parts[0][j].shape[2:]) for j in (0, 1))
        if group is None:
            return out, lse, None
        votes = [pad(p[2], (0, most - p[2].shape[2])) for p in parts]
        return out, lse, torch.cat(votes, 1).view(q.shape[0], -1, most)

    return decode_ragged


decode_ragged = each_head(decode)


def decode_quant(
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
    """`decode` over codes: k and v are (words, scale, zero) as `quantize` makes them, K over token groups, V over channel groups; bits of
    K and of V. near: exact tokens besides, as (k, v (B,Hkv,N,D), which of them are there bool (B,Hkv,N) or None for all, their positions
    (B,Hkv,N)). → out (B,H,T,D) in q's dtype, lse (B,H,T) fp32.
    """
    n, (k, v) = k[0].shape[2], (dequantize(*x, b) for x, b in zip((k, v), bits, strict=True))
    if near is not None:
        exact_k, exact_v, held, pos = near
        seen = [mask(x, kpos, now, None, m) for x, m in ((length, n), (held, pos.shape[2]))]
        seen = [s if s is None else s[:, :, 0] for s in seen]
        everything = [torch.ones(x.shape, dtype=torch.bool, device=q.device) for x in (kpos, pos)]
        length = torch.cat([a if s is None else s for s, a in zip(seen, everything, strict=True)], 2)
        k, v, kpos = torch.cat((k, exact_k.float()), 2), torch.cat((v, exact_v.float()), 2), torch.cat((kpos, pos), 2)
    return decode(q, k, v, length, kpos, now, sliding_window)[:2]


def mass(
    q: Tensor,
    k: Tensor,
    start: int,
    sliding_window: int | None,
    group: str,
    stat: str = "sum",
    noise: tuple[int, float, int] | None = None,
) -> Tensor:
    """What each key receives from a run of queries, softmax over the keys each query sees.

    q (B,H,w,D): the queries of tokens start … start+w−1; k (B,Hkv,S,D): keys of tokens 0 … S−1 → votes (B,Hkv,S) fp32, reduced over the G
    query heads of a KV head by group mean | max. The [H,w,S] weights exist for a block of queries at a time only.
    stat sum: attention, summed over queries. low: how many queries gave less than 1/(keys they see). hit: one more than the token of
    the last query that gave at least that, 0 if none did. noise (seed, tau, h): of the logits plus Gumbel noise, divided by tau; the
    noise depends on the seed, the query head counted from h, and the tokens of query and key alone.
    """
    B, H, Hkv, S = q.shape[0], q.shape[1], k.shape[1], k.shape[2]
    votes = q.new_zeros(B, H if stat == "sum" else Hkv, S, dtype=torch.float32)
    for rows, keys, seen in blocks(q.shape[2], start, sliding_window, q.device):
        score = _scores(q[:, :, rows], k[:, :, keys]).masked_fill(~seen, -torch.inf)  # (B,Hkv,G,t,s)
        token = torch.arange(rows.start + start, rows.stop + start, device=q.device)[:, None]
        if noise is None:
            weight = score.softmax(-1)
        else:
            weight = _noisy(score, noise, token, torch.arange(keys.start, keys.stop, device=q.device))
        if stat == "sum":
            votes[:, :, keys] += weight.sum(3).flatten(1, 2)
            continue
        weight = _group(weight, group)  # (B,Hkv,t,s)
        even = 1 / seen.sum(-1, keepdim=True)
        if stat == "low":
            votes[:, :, keys] += ((weight < even) & seen).sum(2)
        else:
            hit = torch.where((weight >= even) & seen, token + 1.0, 0.0).amax(2)
            votes[:, :, keys] = votes[:, :, keys].maximum(hit)
    return _group(votes.unflatten(1, (Hkv, -1)), group) if stat == "sum" else votes


def _noisy(score: Tensor, noise: tuple[int, float, int], i: Tensor, j: Tensor) -> Tensor:
    """softmax((score + Gumbel noise)/tau) of (B,Hkv,G,t,s) logits between tokens i and j (both broadcast to that shape)."""
    seed, tau, h = noise
    heads = h + torch.arange(score.shape[1] * score.shape[2], dtype=torch.int32, device=score.device)
    heads = heads.view(score.shape[1:3])[..., None, None]
    bits = heads * _signed(0x85EBCA77) + i.int() * _signed(0xC2B2AE3D) + j.int() * _signed(0x27D4EB2F)
    bits = bits + _signed(seed * 0x9E3779B1)
    # a counter-based hash: the same for chunks and batches
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x2C1B3C6D)):
        bits = (bits ^ (bits >> shift & 2 ** (32 - shift) - 1)) * _signed(factor)
    uniform = ((bits >> 9 & 2**23 - 1) + 0.5) / 2**23  # exact in fp32, and never 1
    noisy = (score - (-uniform.log()).log()) / tau
    return (noisy - noisy.logsumexp(-1, keepdim=True).masked_fill(score.isneginf().all(-1, keepdim=True), 0)).exp()


def _signed(x: int) -> int:
    """The low 32 bits of x as int32 has them; its products wrap as those of unsigned numbers do."""
    return (x + 2**31) % 2**32 - 2**31


BLOCK = 128  # queries whose scores exist at once: 128 × 32,768 keys × 32 heads in fp32 are 0.5 GiB


def blocks(
    n: int, start: int, sliding_window: int | None, device: torch.device, block: int = BLOCK
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut n queries, tokens start …, into blocks: (query rows, the keys any of them sees, bool (t,s) who sees what)."""
    for a in range(start, start + n, block):
        b = min(a + block, start + n)
        lo = 0 if sliding_window is None else max(0, a - sliding_window + 1)
        age = torch.arange(a, b, device=device)[:, None] - torch.arange(lo, b, device=device)
        seen = age >= 0 if sliding_window is None else (age >= 0) & (age < sliding_window)
        yield slice(a - start, b - start), slice(lo, b), seen


def mask(length: Tensor | None, kpos: Tensor, now: Tensor, sliding_window: int | None, n: int) -> Tensor | None:
    """bool (B,Hkv,1|T,S): the slots a decode query sees; None if it sees all."""
    seen = None
    if length is not None:
        known = length.dim() == 3
        seen = length[:, :, None] if known else (torch.arange(n, device=length.device) < length[..., None])[:, :, None]
    if sliding_window is not None:
        near = kpos[:, :, None] > now[:, None, :, None] - sliding_window
        seen = near if seen is None else seen & near
    return seen


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(B,Hkv,G,T,S) fp32, scaled."""
    q = q.unflatten(1, (k.shape[1], -1)).float() * q.shape[-1] ** -0.5
    return q @ k[:, :, None].float().transpose(-1, -2)


def _values(weight: Tensor, v: Tensor) -> Tensor:
    """(B,Hkv,G,T,S) × (B,Hkv,S,D) → (B,H,T,D) fp32."""
    return (weight @ v[:, :, None].float()).flatten(1, 2)


def _group(x: Tensor, group: str) -> Tensor:
    if group == "each":
        return x.flatten(1, 2)
    return x.mean(2) if group == "mean" else x.amax(2)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim: x (…,C), weight (C,) → (…,C) in x's dtype."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta in x's dtype, and the norm of that."""
    x = (x.float() + delta.float()).to(x.dtype)
    return x, norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """(…,2C), the gate's half first → (…,C): up · gate · sigmoid(gate)."""
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…,C), weight (N,C), bias (N,) → (…,N) in the weight's dtype."""
    out = x.to(weight.dtype).float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(weight.dtype)


# ---- chunks of which a step reads a few ------------------------------------------------------------------------------


def landmarks(q: Tensor, marks: Tensor, seen: Tensor | None) -> Tensor:
    """What a query q (B,H,1,D) pays to each of the marks (B,Hkv,L,D), softmax over those that are `seen` (B,Hkv,L): the greatest of a KV
    head's query heads, (B,Hkv,L) fp32.
    """
    score = _scores(q, marks)[:, :, :, 0]  # (B,Hkv,G,L)
    if seen is not None:
        score = score.masked_fill(~seen[:, :, None], -torch.inf)
    return score.softmax(-1).amax(2)


def rebuild(
    a: Tensor, b: Tensor, inv_freq: Tensor, first: Tensor, ids: Tensor, fresh: Tensor | None, out: Tensor
) -> None:
    """Keys of whole chunks from their factors, in place. a (B,C,c,r): a row per token; b (B,Hkv,r,D); inv_freq (D/2,); chunk j's ith token
    stands at first (B,) + j·c + i. ids (B,Hkv,k): which chunks, negative: any; fresh bool (B,Hkv,k): the others stay as they are, None:
    all are new. out (B,Hkv,k,c·D).
    """
    (B, heads, k), (C, c, _) = ids.shape, a.shape[1:]
    chosen = ids.clamp(min=0).long()
    line = (torch.arange(B, device=ids.device)[:, None] * C + chosen.flatten(1)).flatten()
    rows = a.view(B * C, -1).index_select(0, line).view(B, heads, k * c, -1)
    pos = first[:, None, None, None] + chosen[..., None] * c + torch.arange(c, device=ids.device)
    new = _turned((rows.float() @ b.float()).unflatten(2, (k, c)), pos, inv_freq).flatten(3).to(out.dtype)
    out.copy_(new if fresh is None else torch.where(fresh[..., None], new, out))


def _turned(x: Tensor, pos: Tensor, inv_freq: Tensor) -> Tensor:
    """x (…,D) fp32 rotated to pos (…)."""
    angle = pos[..., None].float() * inv_freq
    cos, sin, (low, high) = angle.cos(), angle.sin(), x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def fetch(chunks: Tensor, ids: Tensor, fresh: Tensor | None, out: Tensor) -> None:
    """chunks (B,Hkv,C,·), wherever they lie, by ids and fresh as in `rebuild` → out (B,Hkv,k,·) on the device, in place."""
    B, heads, C, width = chunks.shape
    line = torch.arange(B * heads, device=ids.device).view(B, heads, 1) * C
    row, flat, to = (line + ids.clamp(min=0)).flatten(), chunks.view(-1, width), out.view(-1, width)
    if fresh is None:
        to.copy_(flat.index_select(0, row.to(flat.device)), non_blocking=True)
        return
    at = fresh.flatten().nonzero()[:, 0]
    to.index_copy_(0, at, flat.index_select(0, row[at].to(flat.device)).to(to.device, non_blocking=True))


# ---- tokens into their places ----------------------------------------------------------------------------------------


def compact(k: Tensor, v: Tensor, pos: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens at (B,Hkv,N) int64 of k, v (B,Hkv,S,D) and pos (B,Hkv,S); for −1 zeros, at position −1."""
    gone, at = at < 0, at.clamp(min=0)
    row = at[..., None].expand(-1, -1, -1, k.shape[-1])
    k, v = (x.gather(2, row).masked_fill_(gone[..., None], 0) for x in (k, v))
    return k, v, pos.gather(2, at).masked_fill_(gone, -1)


def append(k: Tensor, v: Tensor, row: Tensor, keys: Tensor, values: Tensor) -> None:
    """k, v (B,Hkv,T,D) into the slots `row` (B·Hkv·T,) of keys and values, seen as (slots,D), in place and in their type."""
    for mine, x in (
        (keys, k),
        (values, v),
    ):  # torch scatters bf16 by copying the whole tensor; index_copy_ writes in place
        mine.view(-1, x.shape[3]).index_copy_(0, row, x.reshape(-1, x.shape[3]).to(mine.dtype))


# ---- codes: how numbers become few bits, and how these lie in memory ------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (…,D) uint8 below 2^bits → words. Planar: W words hold W·P codes, the code of channel c in field c div W of word c mod W, so
    that a plane of fields is a run of channels and no kernel ever interleaves.

    8 bits: uint8 (…,D). 4: int16 (…,D/4), four fields each. 2: uint8 (…,D/4), four fields. 3: uint8 (…,3D/8), the two low bits as
    for 2, behind them the third bits, eight fields each.
    """
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat((pack(codes & 3, 2), _pack(codes >> 2, 1, 8, torch.uint8)), -1)
    return _pack(codes, bits, 4, torch.int16 if bits == 4 else torch.uint8)


def _pack(codes: Tensor, bits: int, fields: int, dtype: torch.dtype) -> Tensor:
    planes = codes.unflatten(-1, (fields, -1)).int()
    shift = torch.arange(0, bits * fields, bits, dtype=torch.int32, device=codes.device)[:, None]
    return (planes << shift).sum(-2).to(dtype)


def unpack(words: Tensor, bits: int) -> Tensor:
    """What `pack` packed: (…,D) uint8."""
    if bits == 8:
        return words
    if bits == 3:
        low = words.shape[-1] * 2 // 3
        return unpack(words[..., :low], 2) | _unpack(words[..., low:], 1, 8) << 2
    return _unpack(words, bits, 4)


def _unpack(words: Tensor, bits: int, fields: int) -> Tensor:
    shift = torch.arange(0, bits * fields, bits, dtype=words.dtype, device=words.device)[:, None]
    return (words[..., None, :] >> shift & 2**bits - 1).to(torch.uint8).flatten(-2)


def quantize(x: Tensor, bits: int, tokens: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric, uniform: x (…,S,D) in blocks of `tokens` × `channels` → words, scale and zero (…,S/tokens,D/channels) fp16.

    x ≈ code · scale + zero, code in 0 … 2^bits − 1. Both are rounded so that no code is clipped: with the stored ones the error is at
    most scale/2, for |x| up to fp16's 65,504. A block without a range has scale 1 and code 0.
    """
    # (…,S/tokens,tokens,D/channels,channels)
    blocks = x.float().unflatten(-2, (-1, tokens)).unflatten(-1, (-1, channels))
    least, most = blocks.amin((-3, -1)), blocks.amax((-3, -1))
    zero = least.clamp(-HALF, HALF).half()
    # where rounding lifted the zero above the least, half a step must reach it
    off = (zero.float() - least).clamp(min=0)
    scale = _half_up(torch.maximum((most - zero.float()) / (2**bits - 1), 2 * off))
    scale = scale.masked_fill(scale == 0, 1)
    code = (blocks - spread(zero.float())) / spread(scale.float())
    return pack(code.round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2).flatten(-3, -2), bits), scale, zero


def dequantize(words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What `quantize` kept of x: (…,S,D) fp32."""
    codes = unpack(words, bits)
    tokens, channels = codes.shape[-2] // scale.shape[-2], codes.shape[-1] // scale.shape[-1]
    blocks = codes.float().unflatten(-2, (-1, tokens)).unflatten(-1, (-1, channels))
    return (blocks * spread(scale.float()) + spread(zero.float())).flatten(-2).flatten(-3, -2)


HALF = torch.finfo(torch.float16).max


def spread(x: Tensor) -> Tensor:
    """A number per block (…,n,m) against blocks (…,n,tokens,m,channels)."""
    return x[..., None, :, None]


def _half_up(x: Tensor) -> Tensor:
    """x ≥ 0 in fp16, never below x."""
    half = x.half()
    return torch.where(half.float() < x, (x * (1 + 2**-10) + 2**-24).half(), half).clamp(max=HALF)
