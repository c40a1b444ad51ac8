"""Every kernel's twin in plain torch: the oracle of the tests, and the eager backend.

Written to be read and to be right: logits and softmax are in fp32. The `…_by` functions take the
matrix product as an argument, because backends differ in it. Shapes: q (B,H,T,D); k and
v (B,Hkv,S,D). The G = H/Hkv query heads of one KV head lie next to each other, so `q.view(B, Hkv, G, T, D)` pairs
them with their keys. lse is always a natural logsumexp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad


def prefill(q: Tensor, k: Tensor, v: Tensor, start: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """Attend causally from the tokens start … start+T−1 to the tokens 0 … S−1 of the same text.

    q (B,H,T,D), k and v (B,Hkv,S,D), S = start+T. sliding_window W: token i sees i−W+1 … i. Returns out (B,H,T,D) in
    q's dtype and lse (B,H,T) fp32. Works in blocks of queries, so the whole T×S matrix never exists.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for rows, keys, visible in blocks(q.shape[2], start, sliding_window, q.device):
        logits = _logits(q[:, :, rows], k[:, :, keys]).masked_fill(~visible, -torch.inf)  # (B,Hkv,G,t,s)
        lse[:, :, rows] = logits.logsumexp(-1).flatten(1, 2)
        out[:, :, rows] = _values(logits.softmax(-1), v[:, :, keys]).to(q.dtype)
    return out, lse


def decode(
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
    """Attend from new tokens to all stored tokens. A single new token is stored already, so it sees itself.

    q (B,H,T,D), k and v (B,Hkv,S,D); length (B,Hkv) int: the number of valid slots per head, or (B,Hkv,S) bool: which
    slots are valid, or None: all; key_pos (B,Hkv,S) and query_pos (B,T): absolute positions, read only if
    sliding_window is set (a key is visible if key_pos > query_pos − sliding_window). over_group "mean", "max" or
    "each": also return attention scores, joined over the query heads of a KV head, or one per query head. noise: as
    for `attention_scores`. Returns out (B,H,T,D) in q's dtype, lse (B,H,T) fp32 (−inf where no key is visible, with
    out 0), and scores summed over T, fp32: None, (B,Hkv,S), or (B,H,S) for "each".
    """
    return decode_by(_logits, _values, q, k, v, length, key_pos, query_pos, sliding_window, over_group, noise)


def decode_by(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    values_of: Callable[[Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    over_group: str | None,
    noise: tuple[int, float, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`decode` with other forms of the two products than `_logits` and `_values`."""
    logits = logits_of(q, k)  # (B,Hkv,G,T,S)
    visible = mask(length, key_pos, query_pos, sliding_window, k.shape[2])
    if visible is not None:
        logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weight = (logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    scores = None
    if over_group is not None:
        tokens = query_pos[:, None, None, :, None], key_pos[:, :, None, None]
        scores = _join_group((weight if noise is None else _noisy(logits, noise, *tokens)).sum(3), over_group)
    return values_of(weight, v).to(q.dtype), lse.flatten(1, 2), scores


def each_head(decode: Callable) -> Callable:
    """Return a `decode_ragged` that calls this `decode` for one KV head after the other."""

    def decode_ragged(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Sequence[tuple[int, int]],
        first: Tensor,
        length: Tensor | None,
        key_pos: Tensor,
        query_pos: Tensor,
        sliding_window: int | None,
        over_group: str | None = None,
        noise: tuple[int, float, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend as `decode` does, over KV heads that hold different numbers of tokens.

        k and v (slots,D) and key_pos (slots,): the slots of all (row, KV head) pairs, one pair behind the other;
        spans: the first slot and the number of slots of each pair, as the host knows them; first (B,Hkv,1): the same
        first slots on the device; length (B,Hkv): the number of valid slots, or None: all of the span. Returns what
        `decode` returns, with scores as wide as the longest span, zero beyond a head's own.
        """
        heads, parts = len(spans) // q.shape[0], []
        G, longest = q.shape[1] // heads, max(n for _, n in spans)
        for i, (a, n) in enumerate(spans):
            b, h = divmod(i, heads)
            row, group = slice(b, b + 1), slice(h * G, (h + 1) * G)
            q_head, valid = q[row, group], None if length is None else length[row, h : h + 1]
            if n == 0:
                scores = q_head.new_zeros(1, G if over_group == "each" else 1, 0, dtype=torch.float32)
                lse = torch.full(q_head.shape[:3], -torch.inf, device=q.device)
                parts.append((torch.zeros_like(q_head), lse, scores))
                continue
            k_head, v_head, pos = (x[None, None, a : a + n] for x in (k, v, key_pos))
            head_noise = None if noise is None else (*noise[:2], noise[2] + h * G)
            parts.append(
                decode(q_head, k_head, v_head, valid, pos, query_pos[row], sliding_window, over_group, head_noise)
            )
        out, lse = (torch.cat([p[j] for p in parts], 1).view(*q.shape[:2], *parts[0][j].shape[2:]) for j in (0, 1))
        if over_group is None:
            return out, lse, None
        scores = [pad(p[2], (0, longest - p[2].shape[2])) for p in parts]
        return out, lse, torch.cat(scores, 1).view(q.shape[0], -1, longest)

    return decode_ragged


decode_ragged = each_head(decode)


def decode_quant(
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
    """Attend as `decode` does, over quantised tokens and exact ones.

    k and v: (words, scale, zero) as `quantize` makes them, K in groups of tokens, V in groups of channels; length as
    for `decode`, where a number of slots is whole groups; bits: of K and of V; exact: (k, v (B,Hkv,N,D), length,
    key_pos (B,Hkv,N)). Returns out (B,H,T,D) in q's dtype and lse (B,H,T) fp32.
    """
    k, v = (dequantize(*x, b) for x, b in zip((k, v), bits, strict=True))
    if exact is not None:
        exact_k, exact_v, exact_length, exact_pos = exact
        length = torch.cat([slot_mask(n, x) for n, x in ((length, key_pos), (exact_length, exact_pos))], 2)
        k, v = torch.cat((k, exact_k.float()), 2), torch.cat((v, exact_v.float()), 2)
        key_pos = torch.cat((key_pos, exact_pos), 2)
    return decode(q, k, v, length, key_pos, query_pos, sliding_window)[:2]


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
    """Score every key by the attention it receives from a run of queries. Each query's softmax is over the keys that
    it sees.

    q (B,H,w,D): the queries of tokens start … start+w−1; k (B,Hkv,S,D): the keys of tokens 0 … S−1; over_group "mean"
    or "max": how the G query heads of a KV head are joined. over_queries: "sum": attention summed over queries;
    "rising": the same, with weights that rise evenly from 1 for the first query to 1.2 for the last;
    "count_low": how many queries gave less than 1/(number of keys they see); "last_hit": one more than the token of
    the last query that gave at least that, 0 if none did; "max": the most that one query gave. noise (seed, tau, h):
    Gumbel noise is added to the logits, and the sum divided by tau. The noise depends on the seed, the query head
    counted from h, and the tokens of query and key alone. near: in a sum, only queries that stand fewer than so many
    tokens behind a key count for it. Returns (B,Hkv,S) fp32, or (B,H,S) with over_group "each", which joins no heads.
    The (H,w,S) weights exist for one block of queries at a time.
    """
    how = over_group, over_queries, noise, near
    return attention_scores_by(_logits, q, _wide(k), start, sliding_window, *how, SCORED_AT_ONCE)


def attention_scores_by(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    start: int,
    sliding_window: int | None,
    over_group: str,
    over_queries: str,
    noise: tuple[int, float, int] | None,
    near: int | None,
    block: int,
) -> Tensor:
    """`attention_scores` with another form of the product than `_logits`. block: queries whose logits exist at once."""
    B, H, Hkv, S = q.shape[0], q.shape[1], k.shape[1], k.shape[2]
    sums = over_queries in ("sum", "rising")  # then heads are joined at the end, else query by query
    scores = q.new_zeros(B, H if sums else Hkv, S, dtype=torch.float32)
    for rows, keys, visible in blocks(q.shape[2], start, sliding_window, q.device, block):
        query = torch.arange(rows.start + start, rows.stop + start, device=q.device)[:, None]  # numbers of tokens
        key = torch.arange(keys.start, keys.stop, device=q.device)
        logits = logits_of(q[:, :, rows], k[:, :, keys])  # (B,Hkv,G,t,s)
        # without a sliding window each query sees all keys before the block, which saves a part of the mask
        own = rows.start + start if sliding_window is None else 0
        logits[..., own:].masked_fill_(~visible[:, own:], -torch.inf)
        weight = logits.softmax(-1) if noise is None else _noisy(logits, noise, query, key)
        if sums:
            if over_queries == "rising":
                weight = weight * torch.linspace(1, 1.2, q.shape[2], device=q.device)[rows, None]
            if near is not None:
                weight = weight * (query - key < near)
            scores[:, :, keys] += weight.sum(3).flatten(1, 2)
        else:
            here = scores[:, :, keys]
            here.copy_(_of_queries(_join_group(weight, over_group), here, over_queries, visible, query))
    return _join_group(scores.unflatten(1, (Hkv, -1)), over_group) if sums else scores


def prefill_scored_by(prefill: Callable, attention_scores: Callable) -> Callable:
    """Return a `prefill_scored` that calls these two, one after the other. `prefill` returns no lse."""

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
        """Attend as `prefill` does, and score the first n keys by the same queries, as `attention_scores` does.

        n: the prompt has so many tokens; the keys behind them belong to a scoring pass, as the queries do. scored: runs
        (first, end) of the prompt's tokens, ascending, without overlap. Each query's softmax is then over these and the
        pass's own tokens, as if there were no sliding window, and the other keys' scores are 0. None: over all that it
        sees. Returns out (B,H,T,D) in q's dtype and scores (B,Hkv,n) fp32, or (B,H,n) with over_group "each".
        """
        out, how = prefill(q, k, v, start, sliding_window), (over_group, over_queries, noise, near)
        if scored is None:
            return out, attention_scores(q, k, start, sliding_window, *how)[:, :, :n]
        keys = torch.cat([k[:, :, a:b] for a, b in (*scored, (n, k.shape[2]))], 2)
        lengths = [b - a for a, b in scored]
        found = attention_scores(q, keys, start - n + sum(lengths), None, *how)
        scores = found.new_zeros(*found.shape[:2], n)
        for (a, b), part in zip(scored, found[:, :, : sum(lengths)].split(lengths, 2), strict=True):
            scores[:, :, a:b] = part
        return out, scores

    return prefill_scored


def _of_queries(weight: Tensor, scores: Tensor, over_queries: str, visible: Tensor, query: Tensor) -> Tensor:
    """Return the scores (B,Hkv,s) so far, joined with those of t more queries: weight (B,Hkv,t,s)."""
    if over_queries == "max":
        return scores.maximum(weight.amax(2))
    uniform = 1 / visible.sum(-1, keepdim=True)
    if over_queries == "count_low":
        return scores + ((weight < uniform) & visible).sum(2)
    return scores.maximum(torch.where((weight >= uniform) & visible, query + 1.0, 0.0).amax(2))  # last_hit


def _noisy(logits: Tensor, noise: tuple[int, float, int], i: Tensor, j: Tensor) -> Tensor:
    """Return softmax((logits + Gumbel noise)/tau) of (B,Hkv,G,t,s) logits between tokens i and j, which both
    broadcast to that shape.
    """
    seed, tau, h = noise
    heads = h + torch.arange(logits.shape[1] * logits.shape[2], dtype=torch.int32, device=logits.device)
    heads = heads.view(logits.shape[1:3])[..., None, None]
    bits = heads * _signed(0x85EBCA77) + i.int() * _signed(0xC2B2AE3D) + j.int() * _signed(0x27D4EB2F)
    bits = bits + _signed(seed * 0x9E3779B1)
    # a counter-based hash: the same noise however the prompt is cut into chunks and batches
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x2C1B3C6D)):
        bits = (bits ^ (bits >> shift & 2 ** (32 - shift) - 1)) * _signed(factor)
    uniform = ((bits >> 9 & 2**23 - 1) + 0.5) / 2**23  # exact in fp32, and never 1
    noisy = (logits - (-uniform.log()).log()) / tau
    return (noisy - noisy.logsumexp(-1, keepdim=True).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)).exp()


def _signed(x: int) -> int:
    """Return the low 32 bits of x as an int32, whose products wrap as unsigned ones do."""
    return (x + 2**31) % 2**32 - 2**31


BLOCK = 128  # queries whose logits exist at once: 128 × 32,768 keys × 32 heads in fp32 are 0.5 GiB
SCORED_AT_ONCE = 16  # of `attention_scores`: a CPU's cache holds their logits for a few thousand keys


def blocks(
    n: int, start: int, sliding_window: int | None, device: torch.device, block: int = BLOCK
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut the queries of tokens start … start+n−1 into blocks. Yields (query rows, keys that any of them sees,
    visible (t,s) bool).
    """
    for a in range(start, start + n, block):
        b = min(a + block, start + n)
        lo = 0 if sliding_window is None else max(0, a - sliding_window + 1)
        age = torch.arange(a, b, device=device)[:, None] - torch.arange(lo, b, device=device)
        visible = age >= 0 if sliding_window is None else (age >= 0) & (age < sliding_window)
        yield slice(a - start, b - start), slice(lo, b), visible


def mask(
    length: Tensor | None, key_pos: Tensor, query_pos: Tensor, sliding_window: int | None, n: int
) -> Tensor | None:
    """Return which of n slots a decode query sees, (B,Hkv,1|T,S) bool, or None if it sees all. Arguments as for
    `decode`.
    """
    visible = None
    if length is not None:
        is_mask = length.dim() == 3
        visible = length if is_mask else torch.arange(n, device=length.device) < length[..., None]
        visible = visible[:, :, None]
    if sliding_window is not None:
        in_window = key_pos[:, :, None] > query_pos[:, None, :, None] - sliding_window
        visible = in_window if visible is None else visible & in_window
    return visible


def slot_mask(length: Tensor | None, key_pos: Tensor) -> Tensor:
    """Return which slots are valid, (B,Hkv,S) bool. length as for `decode`; key_pos (B,Hkv,S) has a number per slot."""
    found = mask(length, key_pos, key_pos, None, key_pos.shape[2])
    return torch.ones_like(key_pos, dtype=torch.bool) if found is None else found[:, :, 0]


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """Return q·k/√D, (B,Hkv,G,T,S) fp32."""
    q = _wide(q.unflatten(1, (k.shape[1], -1))) * q.shape[-1] ** -0.5
    # the queries of a group are rows of one matrix, so its keys are not copied for each head
    return (q.flatten(2, 3) @ k.to(q.dtype).transpose(-1, -2)).unflatten(2, q.shape[2:4])


def _values(weight: Tensor, v: Tensor) -> Tensor:
    """Return weight (B,Hkv,G,T,S) times v (B,Hkv,S,D): (B,H,T,D) fp32."""
    return (weight.flatten(2, 3) @ v.to(weight.dtype)).unflatten(2, weight.shape[2:4]).flatten(1, 2)


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32, in which the twins compute; fp64 stays, for those who check a kernel."""
    return x if x.dtype == torch.float64 else x.float()


def _join_group(x: Tensor, over_group: str) -> Tensor:
    """Join the G query heads of each KV head: (B,Hkv,G,…) → (B,Hkv,…), or (B,H,…) for "each"."""
    if over_group == "each":
        return x.flatten(1, 2)
    return x.mean(2) if over_group == "mean" else x.amax(2)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise x (…,C) by the root mean square over its last dimension, times weight (C,). Returns (…,C) in `dtype`;
    the computation is fp32.
    """
    x = _wide(x)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x + delta in x's dtype, and its `rms_norm` in `dtype`."""
    x = x + delta
    return x, rms_norm(x, weight, eps, dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return up · gate · sigmoid(gate) (…,C) of gate_up (…,2C), which holds the gate first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + D/2) of x (B,T,n,D) by angles (RoPE, arXiv:2104.09864, in rotate-half layout).

    cos and sin (B,T,1,D) fp32: of each channel; sin is negative in the first half. Returns x's dtype; the computation
    is fp32.
    """
    wide = _wide(x)
    swapped = wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (wide * cos).addcmul_(swapped, sin.to(wide.dtype)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (…,C) times weight (N,C) transposed, plus bias (N,): (…,N), computed and returned in the weight's
    dtype.
    """
    return F.linear(x.to(weight.dtype), weight, bias)


# ---- sparse attention over chunks ------------------------------------------------------------------------------------


def landmark_scores(q: Tensor, landmarks: Tensor, visible: Tensor | None) -> Tensor:
    """Score every chunk by the attention its landmark receives from one new token.

    q (B,H,1,D), landmarks (B,Hkv,L,D), visible (B,Hkv,L) bool, or None: all.
    Returns (B,Hkv,L) fp32: the largest softmax weight of a KV head's query heads.
    """
    logits = _logits(q, landmarks)[:, :, :, 0]  # (B,Hkv,G,L)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    return logits.softmax(-1).amax(2)


def rebuild_keys(
    a: Tensor,
    b: Tensor,
    inv_freq: Tensor,
    first: Tensor,
    chunk_ids: Tensor,
    is_new: Tensor | None,
    out: Tensor,
) -> None:
    """Compute the keys of whole chunks from their low-rank factors, in place.

    a (B,C,c,r): a row per token of C chunks of c tokens; b (B,Hkv,r,D); inv_freq (D/2,); token i of chunk j has the
    position first (B,) + j·c + i; chunk_ids (B,Hkv,K): the chunk of each slot, negative: any; is_new (B,Hkv,K) bool:
    slots that are to be written, None: all; out (B,Hkv,K,c·D).
    """
    (B, heads, K), (C, c, _) = chunk_ids.shape, a.shape[1:]
    chunk = chunk_ids.clamp(min=0).long()
    line = (torch.arange(B, device=chunk.device)[:, None] * C + chunk.flatten(1)).flatten()
    rows = a.view(B * C, -1).index_select(0, line).view(B, heads, K * c, -1)
    pos = first[:, None, None, None] + chunk[..., None] * c + torch.arange(c, device=chunk.device)
    keys = _rotate_to((_wide(rows) @ _wide(b)).unflatten(2, (K, c)), pos, inv_freq).flatten(3).to(out.dtype)
    out.copy_(keys if is_new is None else torch.where(is_new[..., None], keys, out))


def _rotate_to(x: Tensor, pos: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate x (…,D) to the positions pos (…) with RoPE."""
    angle = pos[..., None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()
    return rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def fetch_chunks(chunks: Tensor, chunk_ids: Tensor, is_new: Tensor | None, out: Tensor) -> None:
    """Copy whole chunks (B,Hkv,C,W), on any device, into the slots out (B,Hkv,K,W), in place.

    chunk_ids and is_new are as for `rebuild_keys`.
    """
    B, heads, C, width = chunks.shape
    line = torch.arange(B * heads, device=chunk_ids.device).view(B, heads, 1) * C
    row, source, slots = (line + chunk_ids.clamp(min=0)).flatten(), chunks.view(-1, width), out.view(-1, width)
    if is_new is None:
        slots.copy_(source.index_select(0, row.to(source.device)), non_blocking=True)
        return
    slot = is_new.flatten().nonzero()[:, 0]
    new = source.index_select(0, row[slot].to(source.device))
    slots.index_copy_(0, slot, new.to(slots.device, non_blocking=True))


# ---- writes of keys and values ---------------------------------------------------------------------------------------


def compact(k: Tensor, v: Tensor, pos: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the kept tokens of every KV head.

    k and v (B,Hkv,S,D), pos (B,Hkv,S); index (B,Hkv,N) int64: which token goes to which place, −1: none.
    Returns k and v (B,Hkv,N,D) and pos (B,Hkv,N). Places without a token hold zeros and position −1.
    """
    is_empty, index = index < 0, index.clamp(min=0)
    row = index[..., None].expand(-1, -1, -1, k.shape[-1])
    k, v = (x.gather(2, row).masked_fill_(is_empty[..., None], 0) for x in (k, v))
    return k, v, pos.gather(2, index).masked_fill_(is_empty, -1)


def take_slots(cursor: Tensor, limit: Tensor, sink: Tensor, first: Tensor, pos: Tensor, slot_pos: Tensor) -> Tensor:
    """Give each head's new token a slot, in place, and return its flat index (B·Hkv,) int64.

    cursor (B,Hkv) int32: how many tokens each head has counted, which becomes one more. While it is below limit
    (B,Hkv) it is the slot; from then on the slots behind the sinks are a ring, so the slot is sink + (cursor − sink)
    mod (limit − sink). first (B,Hkv,1) int64: the flat index of each head's slot 0. slot_pos (slots,) int32 receives
    pos (B,1) at the flat index.
    """
    ring = sink + (cursor - sink) % (limit - sink).clamp(min=1)
    index = (torch.where(cursor < limit, cursor, ring)[..., None] + first).flatten()
    slot_pos.index_copy_(0, index, pos.expand(cursor.shape).flatten().to(torch.int32))
    cursor += 1
    return index


def take_lowest(
    score: Tensor,
    held: Tensor,
    cursor: Tensor,
    limit: Tensor,
    first: Tensor,
    pos: Tensor,
    slot_pos: Tensor,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    """Give each head's new token its next free slot or, where all are taken, the slot of the lowest score, in place.
    Return the slot's flat index (B·Hkv,) int64 and the position of the token that leaves it (B·Hkv,) int32, −1 for none.

    score (B,Hkv,S) fp32, +inf for a token that must stay; of equals the oldest leaves, and NaN counts as the lowest.
    held (B,Hkv,S) int32: the position of the token in each slot, −1 for none. Tokens that the model's sliding window
    hides from pos leave first. The rest is as for `take_slots`.
    """
    score = score.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    if sliding_window is not None:
        score = score.masked_fill(held <= pos[:, None] - sliding_window, -torch.inf)
    empty = held < 0
    score = score.masked_fill(empty, torch.inf)
    stays = (score > score.amin(-1, keepdim=True)) | empty
    oldest = held.masked_fill(stays, torch.iinfo(torch.int32).max).argmin(-1)
    index = (torch.where(cursor < limit, cursor, oldest.to(torch.int32))[..., None] + first).flatten()
    left = slot_pos.index_select(0, index)
    slot_pos.index_copy_(0, index, pos.expand(cursor.shape).flatten().to(torch.int32))
    cursor += 1
    return index, left


def append(k: Tensor, v: Tensor, row: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write k and v (B,Hkv,T,D) into the slots row (B·Hkv·T,) of keys and values, seen as (slots,D), in place and in
    their dtype.
    """
    for slots, x in ((keys, k), (values, v)):
        # index_copy_ writes in place; scatter_ would copy the whole tensor for bf16
        slots.view(-1, x.shape[3]).index_copy_(0, row, x.reshape(-1, x.shape[3]).to(slots.dtype))


# ---- quantisation: how numbers become codes, and how codes lie in memory ---------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (…,D) uint8 below 2^bits into words.

    The layout is planar: W words of P fields hold W·P codes, and the code of channel c is field c div W of word c mod
    W. So field j of all words is a run of channels, and no kernel interleaves. Returns for 8 bits uint8 (…,D); for 4
    int16 (…,D/4) of four fields; for 2 uint8 (…,D/4) of four fields; for 3 uint8 (…,3D/8): the two low bits as for 2
    bits, then the third bits in words of eight fields.
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
    """Return the codes (…,D) uint8 that `pack` packed."""
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
    """Quantise x (…,S,D) in blocks of tokens × channels: x ≈ code · scale + zero, with code in 0 … 2^bits − 1.

    Returns words as `pack` lays them out, and scale and zero point (…,S/tokens,D/channels) fp16. Both are rounded so
    that no code is clipped: dequantised with the stored ones, the error is at most scale/2 for |x| up to fp16's
    65,504. A block of equal numbers has scale 1 and code 0.
    """
    # (…,S/tokens,tokens,D/channels,channels)
    blocks = x.float().unflatten(-2, (-1, tokens)).unflatten(-1, (-1, channels))
    lowest, highest = blocks.amin((-3, -1)), blocks.amax((-3, -1))
    zero = lowest.clamp(-HALF, HALF).half()
    # rounding may lift the zero point above the lowest number; scale/2 must cover that
    lifted = (zero.float() - lowest).clamp(min=0)
    scale = _half_up(torch.maximum((highest - zero.float()) / (2**bits - 1), 2 * lifted))
    scale = scale.masked_fill(scale == 0, 1)
    code = (blocks - spread(zero.float())) / spread(scale.float())
    return pack(code.round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2).flatten(-3, -2), bits), scale, zero


def dequantize(words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return code · scale + zero, (…,S,D) fp32, of what `quantize` returned."""
    codes = unpack(words, bits)
    tokens, channels = codes.shape[-2] // scale.shape[-2], codes.shape[-1] // scale.shape[-1]
    blocks = codes.float().unflatten(-2, (-1, tokens)).unflatten(-1, (-1, channels))
    return (blocks * spread(scale.float()) + spread(zero.float())).flatten(-2).flatten(-3, -2)


HALF = torch.finfo(torch.float16).max


def spread(x: Tensor) -> Tensor:
    """Make one number per block (…,n,m) broadcast against blocks (…,n,tokens,m,channels)."""
    return x[..., None, :, None]


def _half_up(x: Tensor) -> Tensor:
    """Round x ≥ 0 up to an fp16 number, at most 65,504."""
    half = x.half()
    return torch.where(half.float() < x, (x * (1 + 2**-10) + 2**-24).half(), half).clamp(max=HALF)
