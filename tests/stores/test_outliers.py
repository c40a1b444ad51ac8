"""Formats that need more than one scale: GEAR's three parts, levels and centroids that k-means fits, layers merged in pairs; each against
its paper's rule as a slow loop in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import context, kept
from tiny import text

from kernels import reference
from nanokv import parse
from nanokv.model.rope import angles, rotate
from nanokv.stores.quant.fitted import ROUNDS, k_means, rotated_keys, unrotated_keys
from nanokv.stores.quant.minicache import MiniCache, slerp


def numbers(n: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    """(1,2,n,dim): channels of different width, and some numbers that are far out."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, n, dim, generator=draw) * (1 + torch.arange(dim) % 5) + torch.arange(dim) % 3
    return torch.where(torch.rand(x.shape, generator=draw) < 0.02, 9 * x, x)


# ---- GEAR ----


def without_outliers(line: list[float], m: int) -> tuple[list[float], list[int]]:
    order = sorted(range(len(line)), key=lambda i: (line[i], i))
    out = order[:m] + order[len(line) - m :]
    mean = sum(line) / len(line)
    return [mean if i in out else x for i, x in enumerate(line)], out


def on_a_grid(line: list[float], bits: int) -> list[float]:
    """Rounded to 2^bits evenly spaced numbers; scale and zero point are fp16, as the kernels' reference has them."""
    column = torch.tensor(line, dtype=torch.float32)[:, None].expand(-1, 4).contiguous()
    codes, scale, zero = reference.quantize(column, bits, len(line), 1)
    return [c * float(scale[0, 0]) + float(zero[0, 0]) for c in reference.unpack(codes, bits)[:, 0].tolist()]


@pytest.mark.parametrize(("rank", "outliers"), [(2, 1), (0, 2), (3, 0)])
def test_gear_is_its_three_parts(rank, outliers):
    group, dim, bits = 32, 16, 2
    spec = parse(f"full+gear:k={bits},v={bits},group={group},rank={rank},outliers={outliers}").store
    ctx, k, v = context(dim), numbers(group)[:, :, None], numbers(group, seed=1)[:, :, None]
    decoded = spec.decode(ctx.ops, *spec.encode(k, v, ctx))
    for x, found, by_channel in ((k, decoded[0], True), (v, decoded[1], False)):
        for h in range(2):
            matrix = x[0, h, 0].double().numpy()
            lines = matrix.T if by_channel else matrix
            smooth, exact = zip(*(without_outliers(line.tolist(), outliers) for line in lines), strict=True)
            coarse = np.array([on_a_grid(line, bits) for line in smooth])
            lost = np.array(smooth) - coarse
            mine = found[0, h, 0].double().numpy()
            mine = mine.T if by_channel else mine
            is_exact = np.zeros(lines.shape, bool)
            for i, out in enumerate(exact):
                is_exact[i, out] = True
            assert (mine[is_exact] == lines[is_exact]).all()
            # what is left of the error, beside the best that any factors of this rank leave
            left = np.linalg.norm(np.where(is_exact, 0, lost - (mine - coarse)))
            best = math.sqrt((np.linalg.svd(lost, compute_uv=False)[rank:] ** 2).sum())
            assert left <= 1.2 * best + 1e-9 and (rank == 0 or left < 0.95 * np.linalg.norm(lost))


def test_gear_without_its_parts_is_int_and_with_a_full_rank_exact():
    ctx, k, v = context(16), numbers(32)[:, :, None], numbers(32, seed=1)[:, :, None]
    plain, same, exact = (
        parse(f"full+{how},group=32").store
        for how in ("int:k=4,v=4", "gear:rank=0,outliers=0", "gear:rank=16,outliers=0")
    )
    right = plain.decode(ctx.ops, *plain.encode(k, v, ctx))
    assert all(torch.equal(a, b) for a, b in zip(same.decode(ctx.ops, *same.encode(k, v, ctx)), right, strict=True))
    for a, b in zip(exact.decode(ctx.ops, *exact.encode(k, v, ctx)), (k, v), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


# ---- levels and centroids ----


def test_k_means_is_lloyds_loop():
    x, k = numbers(40)[0, :, :, :3].contiguous(), 5
    found = k_means(x, k)
    for points, centroids in zip(x.double().tolist(), found.double().tolist(), strict=True):
        mine = [points[round(i * (len(points) - 1) / (k - 1))] for i in range(k)]
        for _ in range(ROUNDS):
            members = [[] for _ in mine]
            for p in points:
                members[min(range(k), key=lambda j: math.dist(p, mine[j]))].append(p)
            mine = [
                [sum(c) / len(own) for c in zip(*own, strict=True)] if own else old
                for own, old in zip(members, mine, strict=True)
            ]
        torch.testing.assert_close(torch.tensor(centroids), torch.tensor(mine), atol=1e-4, rtol=1e-4)


def rotated_by_hand(k: torch.Tensor, pos: torch.Tensor, ctx) -> torch.Tensor:
    """k (1,2,n,D), rotated as the model rotates keys."""
    return rotate(k.transpose(1, 2), angles(ctx.inv_freq, pos[0])).transpose(1, 2)


def test_keys_are_rounded_as_they_were_before_their_rotation():
    ctx, k = context(16), numbers(30)
    pos = torch.arange(100, 130)[None, None]
    turned = rotated_by_hand(k, pos, ctx)
    torch.testing.assert_close(rotated_keys(k, pos, ctx.inv_freq), turned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unrotated_keys(turned, pos, ctx.inv_freq), k, atol=1e-5, rtol=1e-5)
    # the same vector at two places has the same codes
    codec = parse("full+kvquant").store.codecs([kept(turned, k)], ctx)[0]
    there = codec.encode(rotated_by_hand(k, pos + 7, ctx), pos + 7)
    same = [(a == b).float().mean() for a, b in zip(codec.encode(turned, pos), there, strict=True)]
    assert same[0] > 0.95 and same[2] > 0.95  # rounding in the rotation moves a few


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kvquant_takes_the_nearest_level_and_keeps_outliers(bits):
    ctx, x, dim, n = context(16), numbers(200), 16, 200
    pos = torch.zeros(1, 1, n)  # rotated by nothing
    spec = parse(f"full+kvquant:k={bits},v={bits},outliers=2").store
    codecs = spec.codecs([kept(x, x)], ctx)
    back = [codec.decode(codec.encode(x, pos), pos, torch.float32)[0] for codec in codecs]
    # K was fitted to keys that had been turned back from positions 0 … n−1; its table says what it found
    center, half, levels = codecs[0].table[0].split((dim, dim, 2**bits), -1)
    for h in range(2):
        grid = levels[h].double().tolist()
        assert grid == sorted(grid) and grid[0] > -1.01 and grid[-1] < 1.01
        for t in range(0, n, 9):
            y = [(float(x[0, h, t, c]) - float(center[h, c])) / float(half[h, c]) for c in range(dim)]
            out = sorted(range(dim), key=lambda c: -abs(y[c]))[:2]
            for c in range(dim):
                if c in out:
                    assert back[0][h, t, c] == x[0, h, t, c].half().float()
                    continue
                nearest = min(grid, key=lambda g: abs(g - y[c]))
                assert abs(float(back[0][h, t, c]) - (nearest * float(half[h, c]) + float(center[h, c]))) < 1e-4
    levels = codecs[1].table[0]
    for h in range(2):
        grid = levels[h].double().tolist()
        for t in range(0, n, 9):
            line = x[0, h, t].double().tolist()
            mean = sum(line) / dim
            out = sorted(range(dim), key=lambda c: -abs(line[c] - mean))[:2]
            others = [z for c, z in enumerate(line) if c not in out]
            low, high = min(others), max(others)
            c0 = float(torch.tensor((low + high) / 2).half())
            h0 = float(torch.tensor(max(high - c0, c0 - low) * (1 + 2**-10)).half())
            for c in range(dim):
                nearest = min(grid, key=lambda g: abs(g - (line[c] - c0) / h0))
                right = float(x[0, h, t, c].half()) if c in out else nearest * h0 + c0
                assert abs(float(back[1][h, t, c]) - right) < 1e-4


def test_fitted_levels_lose_less_than_even_ones():
    x = numbers(600).sign() * numbers(600).abs().pow(1.5)  # long tails
    ctx, pos = context(16), torch.zeros(1, 1, 600)
    spec = parse("full+kvquant:v=3,outliers=1").store
    fitted, even = spec.codecs([kept(x, x)], ctx)[1], spec.codecs([kept(x, x)], ctx)[1]
    even.table.copy_(torch.linspace(-1, 1, 8))
    loss = [(c.decode(c.encode(x, pos), pos, torch.float32) - x).pow(2).mean() for c in (fitted, even)]
    assert loss[0] < 0.8 * loss[1]


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_coupled_channels_take_the_nearest_centroid(channels):
    ctx, x, n = context(16), numbers(400), 400
    pos = torch.zeros(1, 1, n)
    codec = parse(f"full+coupled:channels={channels}").store.codecs([kept(x, x)], ctx)[1]
    later = numbers(50, seed=7)
    codes = codec.encode(later, pos[..., :50])[0]
    back = codec.decode([codes], pos[..., :50], torch.float32)
    assert codes.dtype == torch.uint8 and codes.shape == (1, 2, 50, 16 // channels)
    table = codec.table[0].double().view(2, 16 // channels, 256, channels)
    for h in range(2):
        for t in range(0, 50, 5):
            for g in range(16 // channels):
                part = later[0, h, t, g * channels : (g + 1) * channels].double()
                best = min(range(256), key=lambda j: float((table[h, g, j] - part).square().sum()))
                mine = int(codes[0, h, t, g])
                off = [float((table[h, g, j] - part).norm()) for j in (mine, best)]
                assert off[0] <= off[1] + 1e-4
                assert torch.equal(back[0, h, t, g * channels : (g + 1) * channels].double(), table[h, g, mine])


# ---- two layers as one ----


def test_slerp_goes_along_the_arc():
    one, two = torch.tensor([3.0, 0, 0]), torch.tensor([0, 2.0, 0])
    e, a, b, angle = slerp(one, two, 0.6)
    right = [math.cos(math.radians(54)), math.sin(math.radians(54)), 0]  # 0.6 of the way from 0° to 90°
    torch.testing.assert_close(e, torch.tensor(right))
    assert (float(a), float(b)) == (3, 2) and abs(float(angle) - math.pi / 2) < 1e-6
    torch.testing.assert_close(slerp(one, 5 * one, 0.6)[0], one / 3)
    x, y = numbers(50)[0], numbers(50, seed=3)[0]
    e, a, b, angle = slerp(x, y, 0.25)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(2, 50))
    torch.testing.assert_close((e * x / a).sum(-1).acos(), 0.25 * angle, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close((e * y / b).sum(-1).acos(), 0.75 * angle, atol=2e-3, rtol=1e-3)


def test_merged_layers_keep_lengths_one_direction_and_what_points_apart(llm_of):
    llm, n = llm_of("g3"), 60  # three layers; the upper two are merged
    prompt = text(n, seed=5)
    plain, merged = (llm.session(20, None, parse(p)) for p in ("full", "full+minicache:start=0.25,t=0.6,retain=0.1"))
    plain.start([prompt]), merged.start([prompt])
    for session in (plain, merged):
        for t in range(9):
            session.feed(torch.tensor([[t]]))
    true, mine = ([s.cache.stores[i].unpack()[0] for i in range(3)] for s in (plain, merged))
    assert torch.equal(true[0].k, mine[0].k) and torch.equal(true[0].v, mine[0].v)
    for h in range(2):
        # layer 1 reads exact tokens while the prompt runs, so its keys are those of `full`; of the later tokens its lengths are not
        angle = [
            math.acos(float(torch.cosine_similarity(true[1].k[0, h, t].double(), true[2].k[0, h, t].double(), dim=0)))
            for t in range(n)
        ]
        retained = sorted(range(n), key=lambda t: -angle[t])[: math.ceil(0.1 * n)]
        for field in "kv":
            low, up, low_true, up_true = (
                getattr(x, field)[0, h].double() for x in (mine[1], mine[2], true[1], true[2])
            )
            for t in range(n):
                if t in retained:
                    assert torch.equal(low[t], low_true[t]) and torch.equal(up[t], up_true[t])
                    continue
                one, two = low_true[t] / low_true[t].norm(), up_true[t] / up_true[t].norm()
                w = math.acos(float(one @ two))
                e = (math.sin(0.4 * w) * one + math.sin(0.6 * w) * two) / math.sin(w)
                torch.testing.assert_close(low[t], low_true[t].norm() * e, atol=1e-4, rtol=1e-3)
                torch.testing.assert_close(up[t], up_true[t].norm() * e, atol=1e-4, rtol=1e-3)
            for t in range(n, n + 9):  # later tokens are merged one by one
                torch.testing.assert_close(low[t] / low[t].norm(), up[t] / up[t].norm(), atol=1e-4, rtol=1e-3)
    stores = merged.cache.stores
    assert stores[1].planes[0][0] is stores[2].planes[0][0] and stores[1].planes[1][0] is stores[2].planes[1][0]
    sizes = [[layer.bytes for layer in s.report().layers] for s in (plain, merged)]
    assert sizes[1][2] < 0.6 * sizes[0][2] and sizes[1][0] == sizes[0][0]


def test_merged_layers_that_are_the_same_lose_nothing():
    spec, ctx = MiniCache(start=0, retain=0), context(16)
    ctx.config.num_hidden_layers = 2
    rows, stores = [kept(numbers(20), numbers(20, seed=1)) for _ in range(2)], []
    for i, row in enumerate(rows):
        stores.append(spec.pack([row], parse("full").policy, 4, replace(ctx, layer=i)))
        spec.link(stores)
    for store, row in zip(stores, rows, strict=True):
        found = store.unpack()[0]
        torch.testing.assert_close(found.k, row.k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.v, row.v, atol=1e-5, rtol=1e-5)
