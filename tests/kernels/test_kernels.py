"""Compare every kernel with its twin, on shapes that fit no tile: in Triton's interpreter, or on a GPU where there is one.

The interpreter computes bf16 wrongly (with its bits), so these tests use fp16 and fp32; tests/gpu has the rest.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import triton
from helpers import first
from tiny import text

import kernels
from kernels import reference
from nanokv import load, parse
from nanokv.model.rope import angles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3}
B, H, HKV, S, D = 3, 6, 2, 100, 64
LENGTHS = {
    "whole": None,
    "none": [[0, 0]] * B,
    "one": [[1, 1]] * B,
    "all": [[S, S]] * B,
    "ragged": [[0, 7], [99, 1], [64, 100]],
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice).to(DEVICE, dtype)


def cache(dtype: torch.dtype, heads: int = HKV, dim: int = D) -> tuple[torch.Tensor, ...]:
    """Return q, k and v (the first S slots of a larger tensor), key_pos and query_pos."""
    q, k, v = (
        normal(B, H, 1, dim, dtype=dtype),
        normal(B, heads, S + 9, dim, dtype=dtype, seed=1),
        normal(B, heads, S + 9, dim, dtype=dtype, seed=2),
    )
    key_pos = torch.stack([torch.randperm(S, generator=torch.Generator().manual_seed(i)) for i in range(B * heads)])
    return (
        q * 3,
        k[:, :, :S],
        v[:, :, :S],
        key_pos.view(B, heads, S).int().to(DEVICE),
        torch.full((B, 1), S, device=DEVICE),
    )


def lengths(name: str, heads: int = HKV) -> torch.Tensor | None:
    n = LENGTHS[name]
    return (
        None
        if n is None
        else torch.tensor(n, dtype=torch.int32, device=DEVICE).repeat(1, heads)[:, :heads].contiguous()
    )


def same(found, expected, dtype: torch.dtype) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype and not a.isnan().any()
            torch.testing.assert_close(a, b, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("window", [None, 37])
def test_decode(name, window, dtype):
    q, k, v, key_pos, query_pos = cache(dtype)
    ask = q, k, v, lengths(name), key_pos, query_pos, window
    same(kernels.decode(*ask), reference.decode(*ask), dtype)


@pytest.mark.parametrize("over_group", ["mean", "max", "each"])
@pytest.mark.parametrize("name", ["whole", "ragged"])
def test_decode_with_scores(name, over_group):
    q, k, v, key_pos, query_pos = cache(torch.float32)
    ask = q, k, v, lengths(name), key_pos, query_pos, 61, over_group
    same(kernels.decode(*ask), reference.decode(*ask), torch.float32)


@pytest.mark.parametrize(("heads", "dim"), [(6, 96), (1, 64), (3, 16), (2, 128)])
def test_decode_of_other_groups_and_widths(heads, dim):
    q, k, v, key_pos, query_pos = cache(torch.float32, heads, dim)
    mask = normal(B, heads, S, seed=3) > 0
    for length in (lengths("ragged", heads), mask, mask & False):
        ask = q, k, v, length, key_pos, query_pos, None
        same(kernels.decode(*ask), reference.decode(*ask), torch.float32)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_decode_over_eight_bit_floats(kind):
    q, k, v, key_pos, query_pos = cache(torch.float16)
    ask = q, k.to(kind), v.to(kind), lengths("ragged"), key_pos, query_pos, None
    same(kernels.decode(*ask), reference.decode(*ask), torch.float16)


@pytest.mark.parametrize("breakage", ["length", "group", "window", "scores"])
def test_decode_can_fail(breakage):
    """The same comparison, with one thing a little wrong."""
    q, k, v, key_pos, query_pos = cache(torch.float32)
    n, window = lengths("ragged"), 61
    right = reference.decode(q, k, v, n, key_pos, query_pos, window, "mean")
    if breakage == "length":
        n = (n - 1).clamp(min=0)
    if breakage == "group":
        q = q.roll(1, 1)
    if breakage == "window":
        window += 3
    found = list(kernels.decode(q, k, v, n, key_pos, query_pos, window, "mean"))
    if breakage == "scores":
        found[2] = found[2].roll(1, 2)
    with pytest.raises(AssertionError):
        same(found, right, torch.float32)


def ragged(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the numbers of `cache` as `decode_ragged` takes them, with up to three spare slots per head."""
    q, k, v, key_pos, query_pos = cache(dtype)
    n = torch.tensor(LENGTHS["ragged"], dtype=torch.int32, device=DEVICE)
    room = (n + 3).clamp(max=S)
    first = (room.flatten().cumsum(0) - room.flatten()).view_as(room)[..., None]
    flat = [torch.cat([x[b, h, : room[b, h]] for b in range(B) for h in range(HKV)]) for x in (k, v, key_pos)]
    spans = list(zip(first.flatten().tolist(), room.flatten().tolist(), strict=True))
    return (q, *flat[:2], spans, first, n, flat[2], query_pos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("window", "over_group"), [(None, None), (37, None), (None, "mean"), (61, "max"), (None, "each")]
)
def test_decode_ragged(window, over_group, dtype):
    ask = (*ragged(dtype), window, over_group)
    found = kernels.decode_ragged(*ask)
    same(found, reference.decode_ragged(*ask), dtype)
    dense = reference.decode(
        *cache(dtype)[:3], ask[5], *cache(dtype)[3:], window, over_group
    )  # and of the same numbers, padded
    same([found[0], found[1]], dense[:2], dtype)


def test_decode_ragged_without_lengths_takes_the_spans():
    q, k, v, spans, first, n, key_pos, query_pos = ragged(torch.float32)
    exact = [(a, m) for (a, _), m in zip(spans, n.flatten().tolist(), strict=True)]
    ask = q, k, v, exact, first, None, key_pos, query_pos, None
    same(kernels.decode_ragged(*ask), reference.decode_ragged(*ask), torch.float32)
    same(kernels.decode_ragged(*ask), reference.decode_ragged(*ask[:3], spans, first, n, *ask[6:]), torch.float32)


@pytest.mark.parametrize("breakage", ["first", "length"])
def test_decode_ragged_can_fail(breakage):
    ask = [*ragged(torch.float32), None, "mean"]
    right = reference.decode_ragged(*ask)
    if breakage == "first":
        ask[4] = ask[4] + 1
    else:
        ask[5] = (ask[5] - 1).clamp(min=0)
    with pytest.raises(AssertionError):
        same(kernels.decode_ragged(*ask), right, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "dim"), [(0, 64), (1, 64), (37, 96), (S, 16)])
def test_compact(n, dim, dtype):
    _, k, v, key_pos, _ = cache(dtype, dim=dim)
    index = torch.randint(-1, S, (B, HKV, n), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    found, right = kernels.compact(k, v, key_pos, index), reference.compact(k, v, key_pos, index)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    b, h, i = torch.where(index >= 0)
    assert torch.equal(found[0][b, h, i], k[b, h, index[b, h, i]]) and (found[2][index < 0] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T", [1, 5])
def test_append(T, dtype):
    """The tokens come as the projections leave them, with heads side by side."""
    k, v = (normal(B, T, 2, HKV, 96, dtype=dtype, seed=i)[:, :, 1].transpose(1, 2) for i in (1, 2))
    row = torch.randperm(B * HKV * 7, generator=torch.Generator().manual_seed(3))[: B * HKV * T].to(DEVICE)
    slots = [[normal(B, HKV, 7, 96, dtype=dtype, seed=9).clone() for _ in range(2)] for _ in range(2)]
    kernels.append(k, v, row, *slots[0])
    reference.append(k, v, row, *slots[1])
    assert all(torch.equal(a, b) for a, b in zip(*slots, strict=True))
    b, h, t = 2, 1, T - 1
    assert torch.equal(slots[0][0].view(-1, 96)[row.view(B, HKV, T)[b, h, t]], k[b, h, t])


def test_compact_and_append_can_fail():
    _, k, v, key_pos, _ = cache(torch.float32)
    index = torch.arange(9, device=DEVICE).expand(B, HKV, 9)
    assert not torch.equal(kernels.compact(k, v, key_pos, index + 1)[0], reference.compact(k, v, key_pos, index)[0])
    slots = [torch.zeros(B, HKV, 3, D, device=DEVICE) for _ in range(4)]
    kernels.append(k[:, :, :1], v[:, :, :1], torch.arange(6, device=DEVICE), *slots[:2])
    reference.append(k[:, :, :1], v[:, :, :1], torch.arange(1, 7, device=DEVICE), *slots[2:])
    assert not torch.equal(slots[0], slots[2])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "channels"), [(32, 1), (24, 1), (96, 1), (1, 64), (1, 16), (1, 32)])
def test_quantize(bits, tokens, channels):
    x = normal(B, HKV, 96, D, seed=5) * 3 + 1
    x[0, 0, :24, 3], x[1, 1, 7] = 2.5, 0.0  # a channel and a token without a range
    found, right = kernels.quantize(x, bits, tokens, channels), reference.quantize(x, bits, tokens, channels)
    for a, b in zip(found, right, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("breakage", ["bits", "group"])
def test_quantize_can_fail(breakage):
    x = normal(B, HKV, 96, D, seed=5)
    found = kernels.quantize(x, 4, 32, 1)
    right = reference.quantize(x, 2, 32, 1) if breakage == "bits" else reference.quantize(x, 4, 48, 1)
    assert found[0].dtype != right[0].dtype or not torch.equal(found[0], right[0])


@pytest.mark.parametrize("dtype", first(1, [torch.float16, torch.float32]))
@pytest.mark.parametrize("shape", first(2, [(100, 2, 64), (333, 6, 96), (1, 2, 64), (64, 1, 16)]))
@pytest.mark.parametrize("masked", [False, True])
def test_landmark_scores(shape, masked, dtype):
    L, heads, dim = shape
    q, landmarks = normal(B, H, 1, dim, dtype=dtype) * 3, normal(B, heads, L, dim, dtype=dtype, seed=1)
    visible = (normal(B, heads, L, seed=2) > 0) | (torch.arange(L, device=DEVICE) == 0) if masked else None
    same([kernels.landmark_scores(q, landmarks, visible)], [reference.landmark_scores(q, landmarks, visible)], dtype)


FACTORS = [(8, 40, 64), (3, 33, 96), (16, 7, 16), (1, 64, 32)]


def factors(c: int, rank: int, dim: int, dtype: torch.dtype) -> tuple:
    a, b = normal(B, 20, c, rank, dtype=dtype), normal(B, HKV, rank, dim, dtype=dtype, seed=1) * rank**-0.5
    inv_freq = 10000.0 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
    first = torch.tensor([0, 100_000, 7], dtype=torch.int32, device=DEVICE)
    chunk_ids = torch.randint(-2, 20, (B, HKV, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.int32)
    return a, b, inv_freq, first, chunk_ids


@pytest.mark.parametrize("dtype", first(1, [torch.float16, torch.float32]))
@pytest.mark.parametrize(("c", "rank", "dim"), FACTORS)
@pytest.mark.parametrize("some", [False, True])
def test_rebuild_keys(c, rank, dim, some, dtype):
    """Slots that are not new keep their keys. Negative ids may give any key."""
    ask = factors(c, rank, dim, dtype)
    is_new = normal(B, HKV, 9, seed=4) > 0 if some else None
    found, right = (torch.full((B, HKV, 9, c * dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    kernels.rebuild_keys(*ask, is_new, found)
    reference.rebuild_keys(*ask, is_new, right)
    same([found], [right], dtype)
    if some:
        assert (found[~is_new] == 7).all() and (found[is_new] != 7).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16, torch.uint8])
@pytest.mark.parametrize("width", [512, 96, 1])
@pytest.mark.parametrize("some", [False, True])
def test_fetch_chunks(some, width, dtype):
    chunks = (normal(B, HKV, 20, width) * 50).to(dtype)
    chunk_ids, is_new = factors(8, 8, 16, torch.float32)[4], normal(B, HKV, 9, seed=4) > 0 if some else None
    found, right = (torch.full((B, HKV, 9, width), 7, dtype=dtype, device=DEVICE) for _ in range(2))
    kernels.fetch_chunks(chunks, chunk_ids, is_new, found)
    reference.fetch_chunks(chunks, chunk_ids, is_new, right)
    assert torch.equal(found, right) and not torch.equal(found, torch.full_like(found, 7))


@pytest.mark.parametrize("breakage", ["first", "rank", "chunk_ids", "is_new", "visible"])
def test_shadowkv_can_fail(breakage):
    a, b, inv_freq, first, chunk_ids = factors(8, 40, 64, torch.float32)
    q, landmarks, visible = normal(B, H, 1, 64) * 3, normal(B, HKV, 20, 64, seed=1), normal(B, HKV, 20, seed=2) > 0
    found, right = (torch.zeros(B, HKV, 9, 8 * 64, device=DEVICE) for _ in range(2))
    reference.rebuild_keys(a, b, inv_freq, first, chunk_ids, None, right)
    wrong = {"first": first + 1, "rank": b.flip(2), "chunk_ids": chunk_ids.flip(2), "is_new": chunk_ids % 2 == 0}
    if breakage == "visible":
        found, right = kernels.landmark_scores(q, landmarks, visible), reference.landmark_scores(q, landmarks, ~visible)
    else:
        ask = {"rank": b, "inv_freq": inv_freq, "first": first, "chunk_ids": chunk_ids, "is_new": None}
        kernels.rebuild_keys(a, *(ask | {breakage: wrong[breakage]}).values(), found)
    with pytest.raises(AssertionError):
        same([found], [right], torch.float32)


def codes(bits: tuple[int, int], group: int, runs: int, dim: int = D, tokens: int = 96) -> tuple:
    k, v = normal(B, HKV, tokens, dim, seed=1), normal(B, HKV, tokens, dim, seed=2) + 0.5
    return reference.quantize(k, bits[0], group, 1), reference.quantize(v, bits[1], 1, dim // runs)


QUANT = [((4, 4), 32, 2), ((2, 8), 32, 2), ((8, 4), 16, 4)]
MORE_QUANT = [((2, 2), 16, 1), ((8, 8), 48, 1), ((4, 2), 96, 4)]


def exact_tokens(dtype: torch.dtype, has_mask: bool, n: int = 21) -> tuple:
    k, v = normal(B, HKV, n, D, dtype=dtype, seed=5), normal(B, HKV, n, D, dtype=dtype, seed=6)
    pos = torch.arange(80, 80 + n, dtype=torch.int32, device=DEVICE).expand(B, HKV, n).contiguous()
    return k, v, normal(B, HKV, n, seed=7) > -0.5 if has_mask else None, pos


def counts(*numbers: int) -> torch.Tensor:
    """How many slots of each head are valid."""
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE).repeat(B * HKV)[: B * HKV].view(B, HKV)


@pytest.mark.parametrize("form", first(1, [*QUANT, *MORE_QUANT]))
@pytest.mark.parametrize("beside", first(2, [("some", torch.float16), (None, torch.float32), ("all", torch.float32)]))
def test_decode_quant(form, beside):
    (bits, group, runs), (exact, dtype) = form, beside
    q, _, _, key_pos, query_pos = cache(dtype)
    k, v = codes(bits, group, runs)
    key_pos, exact = key_pos[:, :, :96], None if exact is None else exact_tokens(dtype, exact == "some")
    lengths = counts(96, 0, group)
    for length, window in ((None, None), (None, 50), (key_pos % 3 != 0, 50), (key_pos < -1, None), (lengths, 50)):
        if length is lengths and exact is not None:
            exact = *exact[:2], counts(0, 21, 3), exact[3]
        ask = q, k, v, length, key_pos, query_pos, window, bits, exact
        same(kernels.decode_quant(*ask), reference.decode_quant(*ask), dtype)


@pytest.mark.parametrize("breakage", first(2, ["scale", "length", "zero", "field", "exact", "counts"]))
def test_decode_quant_can_fail(breakage):
    q, _, _, key_pos, query_pos = cache(torch.float32)
    bits, key_pos = (4, 4), key_pos[:, :, :96]
    k, v = codes(bits, 32, 2)
    exact, length = exact_tokens(torch.float32, True), key_pos % 3 != 0
    right = reference.decode_quant(q, k, v, length, key_pos, query_pos, None, bits, exact)
    if breakage == "scale":
        k = k[0], k[1].roll(1, 2), k[2]
    if breakage == "zero":
        v = *v[:2], v[2].roll(1, 3)
    if breakage == "field":
        k = k[0].roll(4, 3), *k[1:]
    if breakage == "exact":
        exact = *exact[:2], None, exact[3]
    if breakage == "length":
        length = ~length
    if breakage == "counts":
        length = counts(96, 64)
    with pytest.raises(AssertionError):
        same(kernels.decode_quant(q, k, v, length, key_pos, query_pos, None, bits, exact), right, torch.float32)


@pytest.mark.parametrize("dtype", first(1, [torch.float16, torch.float32]))
@pytest.mark.parametrize(
    ("w", "how", "window"),
    [
        (1, ("mean",), None),
        (16, ("max",), None),
        (21, ("mean",), 40),
        (32, ("max",), 9),
        (90, ("max",), 70),
        (32, ("max", "max"), None),
        (270, ("max", "max"), None),
        (200, ("mean",), 70),
        (150, ("each",), None),
        (130, ("max",), 9),
    ],
)
def test_attention_scores(w, how, window, dtype):
    """The keys come as the projections leave them, with heads side by side. Some queries fill several tiles."""
    n = max(S, w + 7)
    q, k = normal(B, H, w, D, dtype=dtype) * 3, normal(B, n, HKV, D, dtype=dtype, seed=1).transpose(1, 2)
    ask = q, k, n - w, window, *how
    same([kernels.attention_scores(*ask)], [reference.attention_scores(*ask)], dtype)


@pytest.mark.parametrize("dim", [96, 256])
def test_attention_scores_of_wide_heads(dim):
    """A program takes fewer rows at a time where they are long."""
    q, k = normal(1, H, 70, dim) * 3, normal(1, HKV, 90, dim, seed=1)
    ask = q, k, 20, None, "max", "max"
    same([kernels.attention_scores(*ask)], [reference.attention_scores(*ask)], torch.float32)


def test_attention_scores_can_fail():
    q, k = normal(B, H, 16, D) * 3, normal(B, HKV, S, D, seed=1)
    with pytest.raises(AssertionError):
        found, right = (
            f(q, k, S - n, None, "mean") for f, n in ((kernels.attention_scores, 17), (reference.attention_scores, 16))
        )
        same([found], [right], torch.float32)


ROWS = list(itertools.product([torch.float32, torch.float16], [(1, 1, 96), (3, 5, 576), (2, 1000)]))


@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_norms_and_swiglu(dtype, shape):
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], seed=1)
    for out in (dtype, torch.float16):
        ask = weight, 1e-5, out
        same([kernels.rms_norm(x, *ask)], [reference.rms_norm(x, *ask)], out)
        both = zip(kernels.add_rms_norm(x, x.flip(-1), *ask), reference.add_rms_norm(x, x.flip(-1), *ask), strict=True)
        for (found, right), kind in zip(both, (dtype, out), strict=True):
            same([found], [right], kind)
    same([kernels.swiglu(x)], [reference.swiglu(x)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width", "bias"), [(70, 576, True), (3, 33, False), (8, 2048, True)])
def test_linear(rows, width, bias, dtype):
    x, weight = normal(1, 1, width), normal(rows, width, dtype=dtype, seed=1) * width**-0.5
    more = normal(rows, dtype=dtype, seed=2) if bias else None
    same([kernels.linear(x, weight, more)], [reference.linear(x, weight, more)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "heads", "dim"), [(1, 5, 64), (7, 3, 96), (2, 9, 16)])
def test_rotate(T, heads, dim, dtype):
    """x is a part of a wider projection."""
    x, pos = normal(B, T, heads + 2, dim, dtype=dtype)[:, :, :heads], torch.arange(B * T, device=DEVICE).view(B, T) * 37
    angle = angles(1.0 / 10000 ** (torch.arange(0, dim, 2, device=DEVICE) / dim), pos)
    same([kernels.rotate(x, *angle)], [reference.rotate(x, *angle)], dtype)
    with pytest.raises(AssertionError):
        same([kernels.rotate(x, *angle)], [reference.rotate(x, angle[0], -angle[1])], dtype)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("slots", "kinds"), [(6, 2), (40, 3), (2500, 1000)])
def test_take_lowest(slots, kinds, window):
    """Heads with free slots and full ones, of different sizes, with equal scores, against the rule as a loop."""
    generator, rows = torch.Generator().manual_seed(slots), 3
    limit = torch.randint(2, slots + 1, (rows, 2), generator=generator, dtype=torch.int32)
    cursor = limit + torch.tensor([-1, 5], dtype=torch.int32)  # the first head has one free slot
    order = torch.stack([torch.randperm(slots, generator=generator) for _ in range(rows * 2)]).view(rows, 2, slots)
    held = order.int().masked_fill(torch.arange(slots) >= torch.minimum(cursor, limit)[..., None], -1)
    score = torch.randint(0, kinds, (rows, 2, slots), generator=generator).float()
    score = score.masked_fill(torch.rand(score.shape, generator=generator) < 0.2, torch.inf)  # these must stay
    score[1] = score[1].masked_fill(torch.rand(score[1].shape, generator=generator) < 0.1, torch.nan)
    score[2, 1] = torch.nan
    first, pos = (torch.arange(rows * 2) * slots).view(rows, 2, 1), torch.full((rows, 1), slots)
    state = [x.to(DEVICE) for x in (score, held, cursor, limit, first, pos)]
    found, right = ([*(x.clone() for x in state), held.flatten().clone().to(DEVICE), window] for _ in "ab")
    result = kernels.take_lowest(*found)
    assert all(torch.equal(a, b) for a, b in zip(result, reference.take_lowest(*right), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[1:7], right[1:7], strict=True))  # no NaN
    for b in range(rows):
        for h in range(2):
            n, tokens = int(cursor[b, h]), held[b, h].tolist()
            if n < limit[b, h]:
                slot = n
            else:
                first_out = [
                    x.isnan() or (window and t <= slots - window) for x, t in zip(score[b, h], tokens, strict=True)
                ]
                rank = [
                    (-torch.inf if out else float(x), t)
                    for x, t, out in zip(score[b, h], tokens, first_out, strict=True)
                ]
                slot = min(range(int(limit[b, h])), key=rank.__getitem__)
            i = b * 2 + h
            assert result[0][i] == i * slots + slot and result[1][i] == tokens[slot]
            assert found[6][i * slots + slot] == slots and found[2][b, h] == n + 1


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_take_slots(rows):
    """Heads that grow, that fill up, and that wrap, against the rule as a loop."""
    generator = torch.Generator().manual_seed(rows)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, (rows, 2), generator=generator, dtype=torch.int32)

    sink = draw(4)
    limit, cursor = sink + 1 + draw(9), draw(40)
    first = (torch.arange(rows * 2) * 16).view(rows, 2, 1)
    pos = torch.stack((cursor[:, 0].long() + 5, cursor[:, 1].long()), 1)[:, :1]  # a column of a turn
    state = [x.to(DEVICE) for x in (cursor, limit, sink, first, pos)]
    found, right = (
        [*(x.clone() for x in state), torch.full((rows * 32,), -1, dtype=torch.int32).to(DEVICE)] for _ in "ab"
    )
    index = kernels.take_slots(*found)
    assert torch.equal(index, reference.take_slots(*right))
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    for b in range(rows):
        for h in range(2):
            c, most, s = (int(x[b, h]) for x in (cursor, limit, sink))
            while c >= most:
                c -= most - s
            i = (b * 2 + h) * 16 + c
            assert index[b * 2 + h] == i and found[5][i] == pos[b, 0] and found[0][b, h] == cursor[b, h] + 1
    assert (found[5] >= 0).sum() == rows * 2


def test_norms_swiglu_and_linear_can_fail():
    x, weight, kind = normal(3, 576), normal(576, seed=1), torch.float32
    wrong = [
        (kernels.rms_norm(x, weight, 1e-2, kind), reference.rms_norm(x, weight, 1e-5, kind)),
        (kernels.add_rms_norm(x, x, weight, 1e-5, kind)[1], reference.rms_norm(x, weight, 1e-5, kind) + 0.01),
        (
            kernels.add_rms_norm(x, x.flip(-1), weight, 1e-5, kind)[0],
            reference.add_rms_norm(x, x, weight, 1e-5, kind)[0],
        ),
        (kernels.swiglu(x), reference.swiglu(x.roll(288, 1))),
        (kernels.linear(x[:1], normal(70, 576), None), reference.linear(x[:1], normal(70, 576).roll(1, 0), None)),
    ]
    for found, expected in wrong:
        with pytest.raises(AssertionError):
            same([found], [expected], torch.float32)


def test_every_name_is_a_function_though_some_modules_have_the_same_name():
    assert all(inspect.isfunction(getattr(kernels, name)) for name in kernels.__all__)


PLANS = [
    "h2o:budget=20,recent=0.3+fp8:format=e5m2",
    "streaming:sink=2,recent=10,positions=cache+int8:group=4,residual=4",
    "streaming:sink=2,recent=10",
    "adakv:budget=20,window=4,kernel=3",
    "full+shadow:chunk=4,local=1,outliers=3,budget=16,rank=16",
]
MORE = [
    "full",
    "snapkv:budget=20,window=4,kernel=3",
    "h2o:budget=20,recent=0.3",
    "full+int4:group=8,residual=8",
    "full+fp8",
    "snapkv:budget=20,window=4,kernel=3,every=4+fp8:pin=2",
    "full+shadow:chunk=4,local=1,outliers=3,budget=16,rank=16,values=int4",
    "full+quest:chunk=4,budget=16",
    "streaming:sink=2,recent=10+int2:group=4,residual=6",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", [*PLANS, *MORE])
def test_the_backend_gives_the_oracles_logits(plan, llm_of, tiny, steps=4):
    """Through model, caches and stores; a code may fall to its neighbour where sums are ordered otherwise."""
    fast = load(str(tiny("g3")[0]), dtype="float32", backend="triton", device=DEVICE)
    assert fast.models.ops.name == "triton"
    found = []
    for llm in (llm_of("g3"), fast):
        session = llm.session(6, plan=parse(plan))
        out = [session.start([text(44, seed=5)])]
        out += [session.feed(torch.tensor([[t]], device=llm.device)) for t in text(steps, seed=6)]
        found.append(torch.cat(out).cpu())
    close = 2e-3 if "+" in plan else 2e-4
    torch.testing.assert_close(*found, atol=close, rtol=close)


@pytest.mark.exhaustive
def test_the_backend_gives_the_oracles_logits_with_norms_of_heads_and_windows_of_layers(llm_of, tiny):
    fast, found = load(str(tiny("windows")[0]), dtype="float32", backend="triton", device=DEVICE), []
    for llm in (llm_of("windows"), fast):
        session = llm.session(6, plan=parse("snapkv:budget=20,window=4,kernel=3"))
        out = [session.start([text(44, seed=5)])]
        out += [session.feed(torch.tensor([[t]], device=llm.device)) for t in text(4, seed=6)]
        found.append(torch.cat(out).cpu())
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="here it would run")
@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", ["streaming:sink=2,recent=10", "full+int4:group=8,residual=8"])
def test_a_turn_whose_last_piece_is_one_token(plan, llm_of, tiny):
    """Two rows with static shapes: that token is a column of the turn."""
    fast, found = load(str(tiny("g3")[0]), dtype="float32", backend="triton", device=DEVICE), []
    for llm in (llm_of("g3"), fast):
        session = llm.session(20, plan=parse(plan))
        session.start([text(30, seed=5), text(25, seed=6)])
        session.cache.freeze()
        found.append(session.feed(torch.tensor([text(11, seed=7), text(11, seed=8)], device=llm.device)).cpu())
    torch.testing.assert_close(*found, atol=2e-3, rtol=2e-3)


def test_the_backend_reads_and_writes_as_the_oracle_does(llm_of, tiny):
    """One plan through model, cache and store; the others are in -m exhaustive."""
    test_the_backend_gives_the_oracles_logits("snapkv:budget=20,window=4,kernel=3", llm_of, tiny, 2)


def test_the_backend_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="use --backend sdpa"):
        load("smollm2-135m", backend="triton", device="cpu")
