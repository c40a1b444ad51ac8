"""Each scorer against its rule as loops over lists: what a prompt leaves, and what is held at every one of 200 steps."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from helpers import compress, context_of, first, mine, positions, shape, stepped

from kernels.reference import _noisy
from nanokv import parse
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache
from nanokv.model.rope import inverse_frequencies, unrotated
from nanokv.policies.snapkv import SnapKV

STEPS = 200


@pytest.mark.parametrize("case", first(2, [(60, 24, 0.2), (10, 24, 0.5), (60, 24, 0.5), (60, 24, 0.0)]))
def test_h2o_holds_the_papers_set_at_every_step(case):
    T, budget, recent = case
    seen, q, k, _ = stepped(f"h2o:budget={budget},recent={recent}", T)
    for layer in range(2):
        for h in range(2):
            right = oracle.h2o(mine(q[layer], h), k[layer, h], T, STEPS, budget, int(budget * recent))
            for step, held in enumerate(right):
                assert seen[step][layer][h] == sorted(held), (layer, h, step)
                assert len(held) <= budget


def test_keyformer_holds_its_noisy_set_at_every_step():
    seen, q, k, _ = stepped("keyformer:budget=24,recent=0.25,seed=7,tau=1.5", 60)
    for h in range(2):
        right = oracle.h2o(
            mine(q[0], h), k[0, h], 60, STEPS, 24, 6, lambda g, i, j, h=h: oracle.gumbel(7, 3 * h + g, i, j), 1.5
        )
        assert all(seen[step][0][h] == sorted(held) for step, held in enumerate(right))


def test_keyformers_noise_is_gumbels_and_finite():
    for i, j, h in ((1619, 541, 8), (1991, 526, 7), (2273, 1625, 3)):  # here the hash is all ones, or nearly
        out = _noisy(torch.zeros(1, 1, 9, 1, 2), (0, 1.0, 0), torch.tensor([[i]]), torch.tensor([[j, 0]]))[0, 0, h, 0]
        right = torch.tensor([oracle.gumbel(0, h, i, j), oracle.gumbel(0, h, i, 0)]).softmax(0)
        assert right[0] > 0.99  # a noise of 15 or more
        torch.testing.assert_close(out, right)
    noise = {oracle.gumbel(0, h, i, j) for h in range(3) for i in range(40) for j in range(40)}
    mean = sum(noise) / len(noise)
    assert len(noise) > 4700 and mean == pytest.approx(0.577, abs=0.05)  # Euler's constant, that of a Gumbel variable
    hot, plain = (compress(p, shape(), 60)[0] for p in ("keyformer:budget=20,tau=1", "h2o:budget=20,recent=0.3"))
    assert positions(hot[0], 0) != positions(plain[0], 0)


@pytest.mark.parametrize("T", [60, 10])
def test_tova_holds_the_papers_set_at_every_step(T):
    seen, q, k, _ = stepped("tova:budget=24", T)
    for layer in range(2):
        for step, held in enumerate(oracle.tova(q[layer], k[layer], T, STEPS, 24)):
            assert seen[step][layer] == [sorted(held)] * 2, (layer, step)


@pytest.mark.parametrize("T", [60, 10])
def test_scissorhands_holds_the_papers_set_at_every_step(T):
    seen, q, k, _ = stepped("scissorhands:budget=30,every=8,window=20,recent=5", T)
    for layer in range(2):
        for h in range(2):
            right = oracle.scissorhands([mine(q[layer], h)], k[layer, h], T, STEPS, 30, 8, 20, 5)
            for step, held in enumerate(right):
                assert seen[step][layer][h] == held and len(held) <= 30, (layer, h, step)


def test_scissorhands_counts_each_reader_of_a_shared_layer():
    seen, q, k, _ = stepped("scissorhands:budget=30,every=8,window=20,recent=5", 60, 60, {2: 0})
    for h in range(2):
        right = oracle.scissorhands([mine(q[0], h), mine(q[2], h)], k[0, h], 60, 60, 30, 8, 20, 5)
        assert all(seen[step][0][h] == held for step, held in enumerate(right))


@pytest.mark.parametrize("case", first(1, [("ragged", 20, 60, 2), ("dense", 60, 9, 12), ("ragged", 20, 200, 1)]))
def test_corm_holds_what_was_hit_at_every_step(case):
    store, T, window, recent = case
    seen, q, k, _ = stepped(f"corm:window={window},recent={recent},every=5+{store}", T)
    sizes = set()
    for layer in range(2):
        for h in range(2):
            right = oracle.corm(mine(q[layer], h), k[layer, h], T, STEPS, window, recent, 5)
            for step, held in enumerate(right):
                assert seen[step][layer][h] == held, (layer, h, step)
                sizes.add(len(held))
    assert len(sizes) > 5  # heads keep as much as they use


@pytest.mark.parametrize("case", first(2, [(60, 3), (10, 4), (60, 1), (170, 4)]))
def test_cascade_holds_what_real_rings_hold_at_every_step(case):
    T, rings = case
    seen, q, k, _ = stepped(f"cascade:budget=26,sink=2,rings={rings}", T)
    for layer in range(2):
        for step, held in enumerate(oracle.cascade(q[layer], k[layer], T, STEPS, 26, 2, rings)):
            assert seen[step][layer] == [held] * 2, (layer, step)
            if rings == 1:
                assert held == oracle.streaming(0, 2, 24, now=T + step)
    if rings == 4:  # half as dense from ring to ring, so it reaches back further than a window would
        ages = [T + STEPS - 1 - j for j in seen[-1][0][0][2:]]
        assert max(ages) > 2 * 24 and sum(a < 12 for a in ages) > sum(24 <= a < 36 for a in ages)


@pytest.mark.parametrize("full", [0.0, 0.25, 0.5, 1.0])
def test_duo_keeps_the_heads_whole_that_look_beyond_the_edges(full):
    kept, q, k = compress(f"duo:full={full},sink=2,recent=10,window=5", shape(4, 4), 60)
    for i in range(3):
        weight = oracle.attention(q[i, :, -5:], k[i])
        beyond = [sum(weight[h, w, j].item() for w in range(5) for j in range(2, 50)) for h in range(4)]
        whole = oracle.top(beyond, round(4 * full))
        for h in range(4):
            assert positions(kept[i], h) == (list(range(60)) if h in whole else oracle.streaming(60, 2, 10))
            assert kept[i].limit[0, h] == (-1 if h in whole else 12) and kept[i].sink[0, h] == (0 if h in whole else 2)


def test_duo_takes_trained_gates(tmp_path):
    file, gates = tmp_path / "gates.tsv", [[0.9, 0.1, 0.2, 0.3], [0.8, 0.7, 0.6, 0.0], [0.4, 0.05, 0.5, 0.15]]
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in gates))
    kept, *_ = compress(f"duo:gates={file},full=0.5,sink=2,recent=10", shape(4, 4), 60)
    best = sorted(x for row in gates for x in row)[6:]
    for i in range(3):
        assert [len(positions(kept[i], h)) == 60 for h in range(4)] == [g in best for g in gates[i]]
    for text in ("1 2\n", "a b c d\n" * 3, "1 2 3 4\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no number for each of 4 KV heads"):
            compress(f"duo:gates={file}", shape(4, 4), 60)


def test_streaming_holds_sinks_and_recent_at_every_step():
    seen, *_ = stepped("streaming:sink=3,recent=20", 60)
    assert all(held[1] == [oracle.streaming(0, 3, 20, now=60 + t)] * 2 for t, held in enumerate(seen))


@pytest.mark.parametrize("text", ["knorm:budget=20", "keydiff:budget=20"])
def test_keys_alone_decide(text):
    kept, _, k = compress(text, shape(), 60)
    for layer in range(3):
        for h in range(2):
            keys = k[layer][h]
            score = [-x.double().norm().item() for x in keys] if text.startswith("knorm") else oracle.keydiff(keys)
            assert positions(kept[layer], h) == oracle.top(score, 20)


@pytest.mark.parametrize(
    ("T", "budget", "sink", "lag"), [(60, 20, 2, 8), (60, 40, 4, 5), (60, 9, 3, 8), (25, 12, 2, 12)]
)
def test_lagkv_keeps_the_highest_ranks_of_each_partition(T, budget, sink, lag):
    config = shape()
    plan = parse(f"lagkv:budget={budget},sink={sink},lag={lag}").fit(config, torch.float32, T, 8)
    q, k, v = (torch.randn(3, 1, n, T, 16, generator=torch.Generator().manual_seed(2)) for n in (6, 2, 2))
    cache = PromptCache(plan, torch.arange(T), context_of(config))
    for i, layer in enumerate(cache.layers):
        layer.attend(q[i], k[i], v[i], torch.arange(T)[None])
        for h in range(2):
            score = oracle.lagkv(k[i, 0, h], v[i, 0, h], sink, lag)
            best = sorted(range(T), key=lambda j: (-score[j], j))[:budget]
            assert positions(cache.kept[i], h) == sorted(best)


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize(
    ("T", "recent", "sink", "context", "ratio"),
    [(60, 7, 2, 4, 0.4), (60, 12, 0, 0, 0.0), (60, 6, 30, 20, 0.5), (9, 12, 2, 0, 0.3)],
)
def test_pyramidinfer_passes_on_what_the_window_attends_to(T, recent, sink, context, ratio, chunk):
    config = shape(layers=5)
    kept, q, k = compress(
        f"pyramidinfer:ratio={ratio},recent={recent},sink={sink},context={context}", config, T, 3, chunk
    )
    right = oracle.pyramidinfer(q, k, min(recent, T), sink, context, ratio)
    for layer, held in enumerate(right):
        for h in range(2):
            assert positions(kept[layer], h) == held, (layer, h)
        assert layer == 0 or set(held) <= set(right[layer - 1])


@pytest.mark.parametrize("budget", ["72%", "90%", 50, 60])
def test_pyramidinfers_ratio_follows_from_a_budget(budget):
    config = shape(layers=6)
    kept, _, _ = compress(f"pyramidinfer:budget={budget},recent=5,sink=1,context=0", config, 60)
    mean = sum(len(positions(kept[i], 0)) for i in kept) / 6
    most = 0.6 * int(budget[:-1]) if isinstance(budget, str) else budget
    assert most - 1 < mean <= most
    assert positions(kept[0], 0) == list(range(60))
    with pytest.raises(ValueError, match="keep 47 of 60 tokens at least"):
        compress("pyramidinfer:budget=20,recent=20,context=0", config, 60)


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("recovery", [0.1, 0.4, 0.55, 0.65, 0.75, 0.9])
def test_fastgen_gives_each_head_the_first_set_that_recovers_enough(recovery, chunk):
    T, config, kinds = 40, shape(layers=3), torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
    kinds = kinds.masked_fill(torch.arange(T) % 3 > 0, 0)
    plan = parse(f"fastgen:recovery={recovery},frequent=20%,local=6,sink=2").fit(config, torch.float32, T, 8)
    ctx = replace(context_of(config), token_kinds=lambda: kinds)
    dice = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, 1, n, T, 16, generator=dice) * 1.5 for n in (6, 2, 2))
    cache = PromptCache(plan, torch.arange(T), ctx)
    for a in range(0, T, chunk or T):
        part = slice(a, min(a + (chunk or T), T))
        for i, layer in enumerate(cache.layers):
            layer.attend(q[i, :, :, part], k[i, :, :, part], v[i, :, :, part], torch.arange(T)[None, part])
    for i in range(3):
        for h in range(2):
            right = oracle.fastgen(q[i, 0, 3 * h : 3 * h + 3], k[i, 0, h], kinds.tolist(), recovery, 8, 6, 2)
            assert positions(cache.kept[i], h) == right


def test_fastgen_meets_every_one_of_its_sets():
    """The cases above choose special tokens, punctuation, frequent tokens, local ones and everything."""
    dice, sizes = torch.Generator().manual_seed(3), set()
    kinds = [[0, 1, 2, 0, 0, 2, 0][j % 7] for j in range(40)]
    q, k = torch.randn(3, 40, 16, generator=dice) * 1.5, torch.randn(40, 16, generator=dice) * 1.5
    for recovery in (0.1, 0.3, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.99):
        sizes.add(len(oracle.fastgen(q, k, kinds, recovery, 8, 6, 2)))
    assert len(sizes) == 5, sizes


def test_tokens_are_of_three_kinds(llm_of):
    llm = llm_of("g3")
    kinds = llm.models.new_context().token_kinds()
    of = {llm.tokenizer.decode([i]): int(kind) for i, kind in enumerate(kinds)}
    assert [of[c] for c in ".,!_~"] == [2] * 5 and of["a"] == of["7"] == of[" "] == 0


def test_keydiff_drops_a_copy_of_the_mean_key_first():
    config = shape(layers=1)
    plan = parse("keydiff:budget=59").fit(config, torch.float32, 60, 8)
    q, k, v = (torch.randn(1, n, 60, 16, generator=torch.Generator().manual_seed(1)) for n in (6, 2, 2))
    k[0, :, 33] = torch.nn.functional.normalize(k[0], dim=-1).mean(1)
    cache = PromptCache(plan, torch.arange(60), context_of(config))
    cache.layers[0].attend(q, k, v, torch.arange(60)[None])
    assert all(33 not in positions(cache.kept[0], h) for h in range(2))


@pytest.mark.parametrize("chunk", [None, 13])
def test_expected_attention_is_the_closed_form(chunk):
    config, T = shape(), 60
    plan = parse("expected:budget=20,sink=3,future=50").fit(config, torch.float32, T, 8)
    q, k, v = (torch.randn(3, 1, n, T, 16, generator=torch.Generator().manual_seed(4)) for n in (6, 2, 2))
    cache, inv = PromptCache(plan, torch.arange(T), context_of(config)), inverse_frequencies(config)
    for a in range(0, T, chunk or T):
        part = slice(a, min(T, a + (chunk or T)))
        for i, layer in enumerate(cache.layers):
            layer.attend(q[i, :, :, part], k[i, :, :, part], v[i, :, :, part], torch.arange(T)[None, part])
    raw = [unrotated(q[i], torch.arange(T)[None], inv)[0] for i in range(3)]
    for i in range(3):
        for h in range(2):
            score = oracle.expected(mine(raw[i], h), k[i, 0, h], v[i, 0, h], inv, 3, 50)
            assert positions(cache.kept[i], h) == oracle.top(score, 20)


@pytest.mark.parametrize(("budget", "T"), [(20, 60), (30, 45), (21, 300), (8, 60)])
@pytest.mark.parametrize("beta", [1, 2, 20])
def test_pyramid_follows_the_line_and_sums_to_the_flat_budget(budget, T, beta):
    kept, *_ = compress(f"pyramidkv:budget={budget},window=4,kernel=3,beta={beta}", shape(layers=7), T)
    counts = [kept[i].length[0, 0].item() for i in range(7)]
    line = oracle.pyramid(budget, 4, T, 7, beta)
    assert sum(counts) == 7 * budget and counts == sorted(counts, reverse=True) and min(counts) >= 4
    assert all(abs(a - b) < 1 for a, b in zip(counts, line, strict=True))
    assert (len(set(counts)) == 1) == (beta == 1)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_squeezed_budgets_are_those_of_the_best_three_classes(n):
    similarity = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tolist()
    for share, least, most in ((0.3, 4, 999), (0.0, 9, 999), (1.0, 1, 999), (0.1, 4, 50)):
        found = parse(f"squeeze:budget=40,squeeze={share},window=4").policy.squeezed_budgets(similarity, least, most)
        assert found == oracle.squeezed(similarity, 40, share, least, most) and sum(found) == 40 * n
        assert least <= min(found) and max(found) <= most
    assert parse("squeeze:budget=40,window=4").policy.squeezed_budgets(similarity[:2], 4, 99) == [40, 40]


@pytest.mark.parametrize("chunk", [None, 13])
def test_squeeze_sees_how_much_attention_changes_the_residual_stream(chunk, llm_of, monkeypatch):
    """Against what goes into each block and comes out of its attention."""
    llm, seen = llm_of("deep"), []
    real = SnapKV.squeezed_budgets
    monkeypatch.setattr(SnapKV, "squeezed_budgets", lambda self, s, *given: seen.append(s) or real(self, s, *given))
    blocks, before, right = list(llm.models.prefill.layers), {}, [[] for _ in llm.models.prefill.layers]
    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, given, i=i: before.__setitem__(i, given[0].double())))

        def attended(_, given, out, i=i):
            right[i].append(torch.cosine_similarity(before[i], before[i] + out.double(), dim=-1)[0])

        hooks.append(block.self_attn.register_forward_hook(attended))
    llm.session(4, chunk, parse("squeeze:budget=20,window=4")).start([[i * 7 % 90 for i in range(60)]])
    for hook in hooks:
        hook.remove()
    assert seen[0] == pytest.approx([torch.cat(x).mean().item() for x in right], abs=1e-5)
    assert len(set(seen[0])) == len(blocks)


def test_pyramid_counts_the_layers_that_own_storage():
    part = parse("pyramidkv:budget=20,window=4,kernel=3")
    kept, *_ = compress(Plan(part.policy, part.store, {2: 0, 5: 4}), shape(layers=7), 60)
    assert sorted(kept) == [0, 1, 3, 4, 6]
    counts = [kept[i].length[0, 0].item() for i in sorted(kept)]
    assert sum(counts) == 5 * 20 and counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scorer", ["snapkv", "h2o"])
def test_ada_lets_heads_compete_and_keeps_the_total(floor, scorer):
    text = f"{scorer}:heads=ada,floor={floor},budget=20," + (
        "window=4,kernel=1" if scorer == "snapkv" else "recent=0.2"
    )
    kept, q, k = compress(text, shape(4, 4), 60)
    uneven = False
    for i in range(3):
        weight = oracle.attention(q[i], k[i])
        scores = [oracle.heavy(weight[h : h + 1, -4:] if scorer == "snapkv" else weight[h : h + 1]) for h in range(4)]
        right = oracle.ada(scores, 20, floor, list(range(56, 60)))
        assert [positions(kept[i], h) for h in range(4)] == right
        counts = kept[i].length[0].tolist()
        assert sum(counts) == 80 and min(counts) >= int(20 * floor)
        uneven |= len(set(counts)) > 1
    assert uneven == (floor < 1)


def test_chunks_stay_or_go_together():
    kept, q, k = compress("chunkkv:budget=25,window=4,kernel=1,chunk=7", shape(), 60)
    for i in range(3):
        weight = oracle.attention(q[i, :, -4:], k[i])
        scores = [oracle.heavy(mine(weight, h)) for h in range(2)]
        right = oracle.chunkkv(scores, 25, 7, list(range(56, 60)))
        assert [positions(kept[i], h) for h in range(2)] == [right, right]


@pytest.mark.parametrize(
    "text", ["snapkv:budget=24,window=4,kernel=3,every=10", "adakv:budget=24,window=4,kernel=3,every=10"]
)
@pytest.mark.parametrize("share", [{}, {2: 0}])
def test_what_is_held_is_judged_anew_every_so_often(text, share):
    """After ten tokens the last four queries of all that read a layer vote over what is held, as they did over the prompt."""
    seen, q, k, _ = stepped(text, 60, 40, share)
    for t in (10, 20, 30):
        for layer in range(2):
            scores, before = [], [seen[t - 1][layer][h] for h in range(2)]
            for h, held in enumerate(before):
                votes = dict.fromkeys(held, 0.0)
                for i in range(60 + t - 4, 60 + t):
                    for reader in [layer, *(r for r, o in share.items() if o == layer)]:
                        for row in oracle.look(mine(q[reader], h)[:, i], k[layer, h], [j for j in held if j <= i]):
                            for j, p in row.items():
                                votes[j] += p / 3
                old = [0 if j >= 60 + t - 4 else votes[j] for j in held]
                scores.append([max(old[max(0, n - 1) : n + 2]) for n in range(len(old))])
            if text.startswith("ada"):
                window = [list(range(len(s) - 4, len(s))) for s in scores]
                longest = max(map(len, scores))
                padded = [[*s[:-4], *[-1.0] * (longest - len(s)), *s[-4:]] for s in scores]  # windows side by side
                right = oracle.ada(padded, 24, 0.2, list(range(longest - 4, longest)))
                count = [len(r) for r in right]
            else:
                window, count = [list(range(len(s) - 4, len(s))) for s in scores], [24, 24]
            after = [sorted(set(x) - {60 + t}) for x in seen[t][layer]]
            for h in range(2):
                assert after[h] == [before[h][n] for n in oracle.top(scores[h], count[h], window[h])], (t, layer, h)
    assert all(len(x) <= 34 for x in seen[-1][0]) or text.startswith("ada")


@pytest.mark.parametrize(
    "text", ["snapkv:budget=24,window=4", "h2o:budget=24", "tova:budget=24", "knorm:budget=24", "expected:budget=24"]
)
def test_readers_of_a_shared_layer_are_heard(text):
    """The set that a shared layer keeps depends on who reads it, and is the same for every reader."""
    every = {"snapkv": 8, "knorm": 8, "expected": 128}.get(text.split(":")[0])
    plan, steps = f"{text},every={every}" if every else text, max(30, (every or 0) + 5)
    shared, *_ = stepped(plan, 60, steps, {2: 0})
    alone, *_ = stepped(plan, 60, steps, {2: 1})
    assert sorted(shared[0]) == sorted(alone[0]) == [0, 1]
    assert (shared[-1][0] == alone[-1][0]) == text.startswith("knorm")


def test_a_shared_h2o_adds_up_the_votes_of_its_readers():
    seen, q, k, _ = stepped("h2o:budget=24,recent=0.25", 60, 60, {2: 0})
    for h in range(2):
        both = torch.cat(
            (mine(q[0], h), mine(q[2], h))
        )  # six heads' mean is half the sum of two threes': the order is the same
        for step, held in enumerate(oracle.h2o(both, k[0, h], 60, 60, 24, 6)):
            assert seen[step][0][h] == sorted(held), step


def test_expected_attention_looks_again_by_the_queries_since_the_prompt():
    config, T, steps, inv = shape(layers=2), 60, 130, inverse_frequencies(shape())
    seen, q, k, _ = stepped("expected:budget=20,sink=3,future=50,every=128", T, steps)
    dice = torch.Generator().manual_seed(0)  # the values that `stepped` drew
    _, _, v = (torch.randn(2, 1, n, T + steps, 16, generator=dice) * 1.5 for n in (6, 2, 2))
    raw = [unrotated(x[None, :, T : T + 128], torch.arange(T, T + 128)[None], inv)[0] for x in q]
    for i in range(config.num_hidden_layers):
        for h in range(2):
            before, after = seen[127][i][h], sorted(set(seen[128][i][h]) - {T + 128})
            mean_of = torch.cat(
                (torch.zeros(3, 3, 16), mine(raw[i], h)), 1
            )  # the oracle leaves the first three queries out
            score = oracle.expected(mean_of, k[i, h, before], v[i, 0, h, before], inv, 3, 50, now=T + 128)
            assert after == [before[n] for n in oracle.top(score, 20)]


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize(
    ("budget", "sink", "recent", "block", "blend"),
    [(20, 2, 3, 16, None), (30, 0, 0, 100, 0.5), (20, 8, 4, 1, 0.0), (41, 3, 1, 7, 2.0)],
)
def test_compactor_adds_leverage_and_the_attention_within_blocks(budget, sink, recent, block, blend, chunk):
    T, config = 60, shape()
    text = f"compactor:budget={budget},sink={sink},recent={recent},block={block},blend={blend},sketch=12,seed=3"
    plan = parse(text).fit(config, torch.float32, T, 8)
    q, k, v = (torch.randn(3, 1, n, T, 16, generator=torch.Generator().manual_seed(2)) for n in (6, 2, 2))
    cache = PromptCache(plan, torch.arange(T), context_of(config))
    for a in range(0, T, chunk or T):
        part = slice(a, min(a + (chunk or T), T))
        for i, layer in enumerate(cache.layers):
            layer.attend(q[i, :, :, part], k[i, :, :, part], v[i, :, :, part], torch.arange(T)[None, part])
    weight = 1 - budget / T if blend is None else blend
    for i in range(3):
        inv = inverse_frequencies(config)
        right = oracle.compactor(q[i, 0], k[i, 0], v[i, 0], inv, sink, recent, block, 12, weight, 3)
        assert [positions(cache.kept[i], h) for h in range(2)] == [oracle.top(s, budget) for s in right]
