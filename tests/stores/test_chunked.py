"""Stores that drop nothing and read little, and places in the host's memory: against loops, full attention and factors by SVD."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import oracle
import pytest
import torch
from helpers import PLANS, STEPS, context, every, first, run
from oracle import MaskedCache
from tiny import text

from kernels import reference
from nanokv import load, parse
from nanokv.cache.kept import Kept
from nanokv.cache.prefill import PromptCache
from nanokv.engine import Session
from nanokv.policies import POLICIES
from nanokv.runner import Eager
from nanokv.stores import STORES
from nanokv.stores.host.base import HostStore
from nanokv.stores.sparse.chunks import ChunkStore
from nanokv.stores.sparse.shadow import factors

# of 60 tokens: 14 chunks of 4 beside the last one, of which 3 stay exact and 4 are read; every rank there is
SPARSE = "shadow:chunk=4,local=1,outliers=3,budget=16,rank=64"
ALL = SPARSE.replace("budget=16", "budget=44")
PAGES = "quest:chunk=4,budget=16"


def kept(n: int, heads: int = 2, dim: int = 16, seed: int = 0, first: int = 0) -> Kept:
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, heads, n, dim, generator=draw) for _ in range(2))
    k += 1.5 * torch.randn(1, heads, 1, dim, generator=draw)
    one = torch.ones(1, heads, dtype=torch.int32)
    pos = torch.arange(first, first + n, dtype=torch.int32).expand(1, heads, n).contiguous()
    return Kept(k, v, pos, one * n, -one, 0 * one)


def store_of(how: str, rows: list[Kept], room: int = 8, sliding_window: int | None = None) -> ChunkStore:
    heads, dim = rows[0].k.shape[1], rows[0].k.shape[3]
    ctx = replace(context(dim, heads), sliding_window=sliding_window)
    return parse(f"full+{how}").store.pack(rows, POLICIES["full"], room, ctx)


def chosen(store: ChunkStore, q: torch.Tensor, now: int) -> list[set[int]]:
    """Per KV head, the positions that a step fetches."""
    ids = store.choose(q, torch.tensor([[now]]))
    c = store.spec.chunk
    first = int(store.chunk_data["first_pos"][0])
    return [{first + j * c + i for j in head if j >= 0 for i in range(c)} for head in ids[0].tolist()]


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("n", [60, 61, 63])
def test_shadow_chooses_as_the_paper_does(n, heads):
    row, store = kept(n, heads), None
    store = store_of(SPARSE, [row])
    for seed in range(5):
        q = torch.randn(1, 3 * heads, 1, 16, generator=torch.Generator().manual_seed(seed)) * 2
        found = chosen(store, q, n)
        for h in range(heads):
            exact, fetched = oracle.shadow(row.k[0, h], q[0, 3 * h : 3 * h + 3, 0], 4, 1, 3, 16)
            assert store.exact.unpack()[0].pos[0, h].tolist() == exact and found[h] == set(fetched)


@pytest.mark.parametrize("n", [60, 62])
def test_quest_chooses_the_pages_of_the_greatest_bounds(n):
    row = kept(n)
    store = store_of(PAGES, [row])
    for seed in range(5):
        q = torch.randn(1, 6, 1, 16, generator=torch.Generator().manual_seed(seed)) * 2
        for h, found in enumerate(chosen(store, q, n)):
            assert found == set(oracle.quest(row.k[0, h], q[0, 3 * h : 3 * h + 3, 0], 4, 16))


def test_no_key_of_a_page_exceeds_its_bound():
    row, q = kept(64, heads=1), torch.randn(1, 1, 1, 16)
    bound = store_of(PAGES, [row]).score(q, None)[0, 0]
    truth = (row.k[0, 0] @ q[0, 0, 0])[:60].view(15, 4).amax(1)
    assert (bound >= truth - 1e-5).all() and (bound - truth).max() > 0.1


def test_every_token_is_in_exactly_one_place():
    for n in (60, 63, 200):
        row = kept(n)
        store = store_of(SPARSE, [row])
        near, land = store.exact.unpack()[0].pos[0], store.chunk_data["chunk_ids"][0]
        for h in range(2):
            free = [4 * j + i for j in land[h].tolist() for i in range(4)]
            assert sorted(near[h].tolist() + free) == list(range(n))
        assert store.length.tolist() == [[n, n]]
        assert near[0, 12:].tolist() == list(range((n // 4 - 1) * 4, n))  # behind three outliers, the end of the prompt


def test_more_budget_reads_more_and_errs_less():
    row, error, before = kept(200), [], [set(), set()]
    q = torch.randn(1, 6, 1, 16, generator=torch.Generator().manual_seed(1)) * 2
    now = torch.tensor([[200]])
    right = reference.decode(q, row.k, row.v, None, row.pos, now, None)[0]
    for budget in (4, 16, 40, 100, 184):
        store = store_of(SPARSE.replace("budget=16", f"budget={budget}"), [row])
        sets = chosen(store, q, 200)
        assert all(a < b for a, b in zip(before, sets, strict=True))
        before = sets
        error.append((store.read(q, now)[0] - right).norm().item())
    assert error == sorted(error, reverse=True) and error[-1] < 1e-5 < error[-2]


# ---- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "rank"), [(50, 7), (50, 32), (20, 15), (400, 20)])
def test_factors_are_the_best_of_their_rank(n, rank):
    k = torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) * torch.linspace(0.1, 3, 16)
    a, b = factors(k, rank)
    flat = k[0].transpose(0, 1).flatten(1).double()
    mine = (a @ b.transpose(0, 1).flatten(1)).double()
    u, s, vt = torch.linalg.svd(flat, full_matrices=False)
    tail = s[rank:].pow(2).sum().sqrt()
    torch.testing.assert_close((flat - mine).norm(), tail, atol=2e-4 * s[0].item(), rtol=1e-4)
    torch.testing.assert_close(mine, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("first", [0, 37])
def test_keys_of_full_rank_are_rebuilt_where_they_stood(first):
    row = kept(60, first=first)  # what a model's own window of 61 still shows, where it is not the beginning
    store = store_of(SPARSE.replace("rank=64", "rank=32"), [row], sliding_window=61 if first else None)
    keys, values = store._gather_all(store.chunk_data["chunk_ids"])
    for h in range(2):
        at = (store._positions(store.chunk_data["chunk_ids"])[0, h] - first).long()
        torch.testing.assert_close(keys[0, h], row.k[0, h, at], atol=1e-4, rtol=1e-4)
        assert torch.equal(values[0, h], row.v[0, h, at])  # from the host, to the bit


def test_values_in_four_bits_are_those_of_the_rounding():
    row = kept(60, dim=32)
    store = store_of(SPARSE + ",values=int4", [row])
    _, values = store._gather_all(store.chunk_data["chunk_ids"])
    right = reference.dequantize(*reference.quantize(row.v, 4, 1, 32), 4)
    at = store._positions(store.chunk_data["chunk_ids"]).long()
    for h in range(2):
        torch.testing.assert_close(values[0, h], right[0, h, at[0, h]], atol=1e-6, rtol=0)
    assert not store.host_tensors() and store_of(SPARSE, [row]).host_tensors()


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", first(3, ["g3", "mqa", "head-dim", "llama2", "mistral-v2", "llama31"]))
@pytest.mark.parametrize("plan", [f"full+{ALL}", "full+quest:chunk=4,budget=56", f"full+{ALL},values=device"])
def test_reading_all_of_full_rank_is_full_attention(plan, model, llm_of):
    llm, prompt, more = llm_of(model), text(60, seed=5), text(STEPS, seed=6)
    full, _ = run(llm, "full", [prompt], [more])
    mine, _ = run(llm, plan, [prompt], [more])
    assert torch.equal(full[:, 0], mine[:, 0])  # the prompt's own attention is exact
    torch.testing.assert_close(mine, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "plan", ["full+shadow:chunk=2,local=1,outliers=2,budget=16,rank=64", "full+quest:chunk=2,budget=20"]
)
def test_chunks_leave_with_the_models_own_window(plan, llm_of):
    """24 tokens are seen, and 14 come: the last chunks of the prompt are passed token by token."""
    llm, prompt, more = llm_of("mistral"), text(60, seed=5), text(STEPS, seed=6)
    full, _ = run(llm, "full", [prompt], [more])
    session = llm.session(STEPS, plan=parse(plan))
    session.start([prompt])
    assert all(store.n_candidates for store in session.cache.stores.values())
    mine, _ = run(llm, plan, [prompt], [more])
    torch.testing.assert_close(mine, full, atol=1e-4, rtol=1e-4)


class Choices:
    """What a run's steps saw, noted as they choose: {token: {layer: [set of positions per head]}}."""

    def __init__(self, session: Session):
        self.held = {}
        for i, store in session.cache.stores.items():
            store.choose = self.noting(i, store, store.choose)

    def noting(self, layer: int, store: ChunkStore, choose):
        def noted(q, pos):
            ids, c = choose(q, pos), store.spec.chunk
            near = store.exact.unpack()[0]
            self.held.setdefault(int(pos[0, 0]), {})[layer] = [
                {
                    *near.pos[0, h, : near.length[0, h]].tolist(),
                    *(j * c + i for j in ids[0, h].tolist() for i in range(c)),
                }
                for h in range(ids.shape[1])
            ]
            return ids

        return noted


@pytest.mark.parametrize("model", ["llama2", "g3"])
@pytest.mark.parametrize("plan", [SPARSE, SPARSE + ",reuse=false", PAGES])
@pytest.mark.parametrize("turn", [1, 5])
def test_a_sparse_step_is_full_attention_with_a_mask(turn, plan, model, llm_of):
    """A turn of several tokens sees everything."""
    llm, prompt, more = llm_of(model), text(60, seed=5), text(STEPS + 1, seed=6)
    session = llm.session(STEPS + 1, plan=parse(f"full+{plan}"))
    logits = [session.start([prompt])[:, None]]
    choices = Choices(session)
    for t in range(0, STEPS + 1, turn):
        logits.append(session.feed(torch.tensor([more[t : t + turn]]), every_logit=True))
    held = choices.held
    cache = MaskedCache(llm.config, lambda layer, h, i, j: i not in held or j >= 60 or j in held[i][layer][h])
    model = llm.models.prefill
    with torch.no_grad():
        ids = torch.tensor([prompt + more])
        expected = model.logits(model.hidden(ids, torch.arange(ids.shape[1])[None], cache))[0, 59:]
    assert len(held) == (STEPS + 1 if turn == 1 else 0) and all(len(h) < i for i, x in held.items() for h in x[0])
    torch.testing.assert_close(torch.cat(logits, 1)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "plan", [SPARSE, PAGES, SPARSE + ",values=int4", "full+kcache:n=12,sink=2,recent=4", "offload"]
)
def test_a_batch_of_unequal_rows_is_each_row_alone(plan, llm_of):
    """One row long enough for chunks, one less so, one that lies exact."""
    plan = plan if "+" in plan or plan in ("offload", "kcache") else f"full+{plan}"
    llm, prompts = llm_of("g3"), [text(60, seed=5), text(47, seed=7), text(9, seed=8)]
    more = [text(STEPS, seed=s) for s in (6, 9, 10)]
    together, _ = run(llm, plan, prompts, more)
    for row, (prompt, rest) in enumerate(zip(prompts, more, strict=True)):
        alone, _ = run(llm, plan, [prompt], [rest])
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_of_the_prompt_no_more_than_one_layer_is_whole_at_a_time(llm_of, monkeypatch):
    """What a finished layer leaves behind while the next ones are computed."""
    llm, left = llm_of("deep"), []
    finish = PromptCache.compress

    def noted(self, owner):
        finish(self, owner)
        left.append({k.k.shape[2] for k in self.kept.values()})

    monkeypatch.setattr(PromptCache, "compress", noted)
    for plan in (f"full+{SPARSE}", "full", "simlayer:variant=light,sink=2,recent=16,window=4,full=8+" + SPARSE):
        llm.session(8, plan=parse(plan)).start([text(200, seed=5)])
    exact = 4 * (1 + 3)
    assert left == [{exact}] * 8 + [{200}] * 8 + [set()] * 7 + [
        {exact}
    ]  # a policy that chooses across layers waits for all


def test_a_short_prompt_is_simply_exact(llm_of):
    llm, prompt, more = llm_of("g3"), text(20, seed=5), text(STEPS, seed=6)
    full, _ = run(llm, "full", [prompt], [more])
    mine, _ = run(llm, f"full+{SPARSE}", [prompt], [more])
    assert torch.equal(full, mine)


def test_what_is_there_already_is_not_fetched_again_and_nothing_else_changes(llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    moved = {True: 0, False: 0}
    logits = []
    for reuse in (True, False):
        ops = llm.models.ops

        def fetch(chunks, ids, fresh, out, reuse=reuse, real=ops.fetch_chunks):
            moved[reuse] += int(fresh.sum()) if fresh is not None else ids.numel()
            real(chunks, ids, fresh, out)

        session = Session(
            replace(llm.models, ops=replace(ops, fetch_chunks=fetch)),
            parse(f"full+{SPARSE},reuse={str(reuse).lower()}"),
            20,
        )
        out = [session.start([prompt])]
        out += [session.feed(torch.tensor([[t]])) for t in more]
        logits.append(torch.cat(out))
    assert torch.equal(*logits)
    assert 0 < moved[True] < moved[False] == 3 * 2 * 4 * STEPS  # layers, KV heads, chunks


def test_slots_keep_what_is_wanted_again():
    store = store_of(SPARSE, [kept(60)])
    wanted = torch.tensor([[[5, 2, 9, 7], [1, 2, 3, 4]]], dtype=torch.int32)
    held, fresh = store.assign_buffer(wanted)
    assert held.tolist() == wanted.tolist() and fresh.all()
    store.buffered_ids.copy_(held)
    held, fresh = store.assign_buffer(torch.tensor([[[7, 8, 5, 0], [4, 3, 2, 1]]], dtype=torch.int32))
    assert held.tolist() == [[[5, 8, 0, 7], [1, 2, 3, 4]]]
    assert fresh.tolist() == [[[False, True, True, False], [False] * 4]]


@pytest.mark.exhaustive
def test_five_hundred_tokens_do_not_overflow(llm_of):
    llm, more = llm_of("g3"), text(380, seed=6)
    session = llm.session(380, plan=parse(f"full+{ALL}"))
    full = llm.session(380)
    for s in (session, full):
        s.start([text(60, seed=5)])
    for t in more:
        a, b = (s.feed(torch.tensor([[t]])) for s in (session, full))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert session.cache.stores[0].length.tolist() == [[440, 440]]
    store = store_of(SPARSE, [kept(60)], room=500)
    for i in range(500):
        new = torch.randn(1, 2, 1, 16)
        store.append(new, new, torch.tensor([[60 + i]]))
    out, lse, _ = store.read(torch.randn(1, 6, 1, 16), torch.tensor([[560]]))
    assert out.isfinite().all() and lse.isfinite().all() and int(store.length[0, 0]) == 560


@pytest.mark.parametrize("model", ["mqa", "g3"])  # whose prompts have tokens for every rank
@pytest.mark.parametrize("store", ["shadow:chunk=4,local=1,outliers=3,budget=24,rank=64", "quest:chunk=4,budget=24"])
def test_what_is_generated_becomes_chunks_in_time(store, model, llm_of):
    """Reading all of full rank, singly and in turns, of two rows: whatever moved between steps, attention is full attention."""
    llm, prompts = llm_of(model), [text(60, seed=5), text(47, seed=6)]
    pieces = [text(n, seed=n) for n in (1, 1, 1, 13, 1, 1, 30, 1)]
    logits, sessions = [], []
    for plan in ("full", f"full+{store},grow=10"):
        session = llm.session(60, plan=parse(plan))
        out = [session.start(prompts)]
        if plan != "full":  # everything is read, however many chunks there are
            for s in session.cache.stores.values():
                s.choose = lambda q, pos, s=s: wide(s)
        out += [session.feed(torch.tensor([p, p])) for p in pieces]
        logits.append(torch.stack(out))
        sessions.append(session)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    for s in sessions[1].cache.stores.values():
        assert s.n_candidates_of[0] >= (60 + 49 - 10) // 4 - 1 - 3
        assert s.length.tolist() == [[60 + 49] * s.length.shape[1], [47 + 49] * s.length.shape[1]]
        for row, n in enumerate((109, 96)):
            assert all(p.tolist() == list(range(n)) for p in s.unpack()[row].pos[0, :, :n])


def wide(store: ChunkStore) -> torch.Tensor:
    """All chunks, in a buffer that is made to hold them."""
    ids = store.chunk_data["chunk_ids"]
    there = torch.arange(ids.shape[2]) < store.chunk_data["n_candidates"][:, None, None]
    ids = torch.where(there, ids, -1 - torch.arange(ids.shape[2], dtype=torch.int32))
    if store.buffered_ids.shape != ids.shape:
        store.buffered_ids, store.uniform = (
            torch.full_like(ids, -99) - torch.arange(ids.shape[2], dtype=torch.int32),
            False,
        )
        store.keys, store.values = (torch.zeros(*ids.shape, store.keys.shape[3]) for _ in range(2))
    return ids


def test_growing_saves_bytes_and_survives_saving_and_more_room(llm_of, tmp_path):
    from nanokv.save import restore, save

    llm, more, sizes = llm_of("g3"), text(100, seed=6), []
    for grow in (0, 10):
        session = llm.session(120, plan=parse(f"full+{SPARSE},grow={grow}"))
        session.start([text(60, seed=5)])
        for t in more[:50]:
            session.feed(torch.tensor([[t]]))
        sizes.append(session.report().bytes)
    assert sizes[1] < 0.7 * sizes[0]
    save(llm, session, tmp_path / "c")
    again = restore(llm, tmp_path / "c", 60)
    for t in more[50:53]:
        session.feed(torch.tensor([[t]])), again.feed(torch.tensor([[t]]))
    for s in (session, again):
        s.reserve(200)  # in between two moves
        s.feed(torch.tensor([more[53:72]]))
        assert s.cache.stores[0].unpack()[0].pos[0, 0].tolist() == list(range(132))
    for t in more[72:100]:
        a, b = (s.feed(torch.tensor([[t]])) for s in (session, again))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16/float16", "float32/bfloat16"])
@pytest.mark.parametrize(
    "plan", [SPARSE, SPARSE + ",reuse=false", SPARSE + ",values=int4", PAGES, "dense+kcache:n=40", "dense+offload"]
)
def test_prompts_and_tokens_of_two_types(plan, dtype, tiny):
    llm = load(str(tiny("g3")[0]), dtype=dtype)
    session = llm.session(9, plan=parse(f"full+{plan}"))
    session.start([text(60, seed=5)])
    assert session.feed(torch.tensor([[3]])).isfinite().all()
    wide = [
        x for s in session.cache.stores.values() for x in (*s.tensors(), *s.host_tensors()) if x.is_floating_point()
    ]
    assert {x.dtype for x in wide} <= {session.context.dtype, torch.float16}


def test_what_was_exact_stays_exact_in_new_memory(llm_of, tmp_path):
    """A prompt too short for chunks, and enough said since for some."""
    from nanokv.save import restore, save

    llm, more, logits = llm_of("g3"), text(60, seed=6), []
    for way in ("as it is", "reserve", "save"):
        session = llm.session(70, plan=parse(f"full+{SPARSE}"))
        session.start([text(20, seed=5)])
        for t in more[:40]:
            session.feed(torch.tensor([[t]]))
        if way == "reserve":
            session.reserve(300)
        if way == "save":
            save(llm, session, tmp_path / "c")
            session = restore(llm, tmp_path / "c", 30)
        logits.append(torch.cat([session.feed(torch.tensor([[t]])) for t in more[40:]]))
        assert not any(s.n_candidates for s in session.cache.stores.values())
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


# ---- with other parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [ALL, "quest:chunk=4,budget=56"])
@pytest.mark.parametrize(
    "keep",
    ["simlayer:threshold=0.25,sink=2,recent=16,window=4", "simlayer:variant=light,sink=2,recent=16,window=4,full=1"],
)
def test_a_lazy_layer_lies_in_the_exact_part(keep, store, llm_of):
    llm, prompts, more = llm_of("g3"), [text(60, seed=5), text(60, seed=9)], [text(STEPS, seed=6), text(STEPS, seed=7)]
    dense, held = run(llm, keep, prompts, more)
    mine, again = run(llm, f"{keep}+{store}", prompts, more)
    torch.testing.assert_close(mine, dense, atol=1e-4, rtol=1e-4)
    assert held == again
    session = llm.session(STEPS, plan=parse(f"{keep}+{store}"))
    session.start(prompts)
    lazy = {bool(x) for s in session.cache.stores.values() for x in (s.n_candidates_of if s.n_candidates else [0])}
    assert lazy == {True, False}


def test_an_edge_without_sinks_makes_no_chunks(llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    keep = "simlayer:variant=decode,threshold=0.1,sink=0,recent=48"
    dense, held = run(llm, keep, [prompt], [more])
    mine, again = run(llm, f"{keep}+{ALL.replace('budget=44', 'budget=28')}", [prompt], [more])
    torch.testing.assert_close(mine, dense, atol=1e-4, rtol=1e-4)
    assert held == again


def test_readers_of_a_shared_layer_choose_each_for_itself(llm_of):
    llm, prompt, more = llm_of("g3"), text(60, seed=5), text(STEPS, seed=6)
    shared, mine = ({**vars(parse(p))} for p in ("full", f"full+{ALL}"))
    plans = [replace(parse(p), share={2: 0}) for p in ("full", f"full+{ALL}")]
    assert shared["store"] != mine["store"]
    logits = [run(llm, plan, [prompt], [more])[0] for plan in plans]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    sparse = [replace(parse(f"full+{SPARSE},reuse={r}"), share={2: 0}) for r in ("true", "false")]
    assert torch.equal(*(run(llm, plan, [prompt], [more])[0] for plan in sparse))


def test_what_cannot_be_is_refused_in_a_sentence():
    for plan, why in (
        ("snapkv+shadow", "form no chunks"),
        ("streaming+quest", "form no chunks"),
        ("int4+offload", "choose one"),
        ("shadow+kcache", "choose one"),
        ("offload+kcache", "both decide how they are stored"),
        ("shadow:budget=0", "percent of the prompt"),
        ("shadow:budget=200%", "percent of the prompt"),
        ("shadow:values=disk", "host, device or int4"),
        ("shadow:chunk=0", "at least 1"),
        ("kcache:n=3", "more than sink"),
        ("keyformer+kcache", "scores with noise"),
        ("streaming:positions=cache+kcache", "positions=absolute"),
        ("shadow:budget=²%", "percent of the prompt"),
    ):
        with pytest.raises(ValueError, match=why) as e:
            parse(plan)
        assert "\n" not in str(e.value)


# ---- on the host ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", first(1, ["mistral", "g3"]))
@pytest.mark.parametrize("plan", every(2, [p for p in PLANS if parse(p).names[1] in ("dense", "ragged")]))
def test_offloaded_slots_give_the_same_bits(plan, model, llm_of):
    plan = replace(parse(plan), store=STORES["dense"])
    llm, prompt, more = llm_of(model), text(60, seed=5), text(STEPS, seed=6)
    here, held = run(llm, plan, [prompt], [more])
    there, again = run(llm, replace(plan, store=STORES["offload"]), [prompt], [more])
    assert torch.equal(here, there) and held == again


def test_on_a_cpu_offloading_moves_nothing(llm_of):
    """Host and device are one memory: what a step reads is what it holds."""
    llm = llm_of("g3")
    session, reads = llm.session(STEPS, plan=parse("offload")), []
    ops = llm.models.ops

    def decode(q, k, v, *rest):
        reads.append((k.data_ptr(), v.data_ptr()))
        return ops.decode(q, k, v, *rest)

    session = Session(replace(llm.models, ops=replace(ops, decode=decode)), parse("offload"), STEPS)
    session.start([text(60, seed=5)])
    session.feed(torch.tensor([[3]]))
    assert reads == [tuple(x.data_ptr() for x in s.host_tensors()) for s in session.cache.stores.values()]
    report = session.report()
    assert report.host_bytes == sum(x.nbytes for s in session.cache.stores.values() for x in s.host_tensors())
    assert report.bytes < 0.2 * report.host_bytes and "host 0 B" not in str(report)


class Stream:
    """Stands in for a CUDA stream that does its work at once, which is one of the orders that a device may choose."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        assert event is not None

    def record_event(self):
        return object()

    def synchronize(self):
        pass


@pytest.mark.parametrize("layers", first(2, [1, 4, 2, 3]))
@pytest.mark.parametrize(
    "plan",
    [
        "full",
        "snapkv:budget=20,window=4,kernel=3,every=5",
        "streaming:sink=2,recent=10",
        "pyramidkv:budget=20,window=4,kernel=3",
    ],
)
@pytest.mark.parametrize("share", [{}, {1: 0}], ids=["own", "shared"])
def test_layers_that_come_over_two_at_a_time_are_the_right_ones(share, plan, layers, llm_of, monkeypatch):
    """The device's part of offloading, with host and device one memory but two copies."""
    llm, plan = llm_of("deep"), replace(parse(plan), share=share if layers > 1 else {})
    models = replace(llm.models, **dict.fromkeys(("prefill", "decode"), cut(llm.models.decode, layers)))
    models = replace(models, runner=Eager(models.decode))
    logits = []
    for place in ("dense", "offload"):
        if place == "offload":
            monkeypatch.setattr(HostStore, "host_is_apart", property(lambda self: True))
            monkeypatch.setattr(torch.cuda, "Stream", Stream)
            monkeypatch.setattr(torch.cuda, "current_stream", Stream)
            monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
        session = Session(models, replace(plan, store=STORES[place]), 40)
        out = [session.start([text(60, seed=5), text(47, seed=8)])]
        out += [
            session.feed(torch.tensor([text(n, seed=n), text(n, seed=n + 1)])) for n in (1, 1, 6, 1, 1, 1, 1, 1, 1, 1)
        ]
        logits.append(torch.stack(out))
    assert torch.equal(*logits)
    stores = session.cache.stores.values()
    staged = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for s in stores for x in s.staged()}
    largest = max(max(p.nbytes for (p,) in s.planes) for s in stores)
    assert len(staged) == (4 if len(stores) > 1 else 2) and set(staged.values()) == {largest}


def cut(model, layers: int):
    """The first layers of a model."""
    short = copy.copy(model)
    short._modules = {**model._modules, "layers": model.layers[:layers]}
    short.config = replace(model.config, num_hidden_layers=layers)
    return short


@pytest.mark.parametrize("model", ["llama2", "g3", "mistral"])
def test_kcache_that_fetches_all_is_full_attention(model, llm_of):
    llm, prompt, more = llm_of(model), text(60, seed=5), text(STEPS, seed=6)
    full, _ = run(llm, "full", [prompt], [more])
    for norm in ("true", "false"):
        mine, _ = run(llm, f"kcache:n=100,norm={norm}", [prompt], [more])
        torch.testing.assert_close(mine, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_kcache_fetches_the_values_of_the_greatest_weights(norm):
    row, n = kept(60), 12
    place = replace(STORES["kcache"], n=n, sink=2, recent=4, norm=norm)
    store = place.pack([row], POLICIES["full"], 8, context(16, 2))
    q = torch.randn(1, 6, 1, 16, generator=torch.Generator().manual_seed(2)) * 2
    out, lse, _ = store.read(q, torch.tensor([[59]]))
    for h in range(6):
        group = range(h // 3 * 3, h // 3 * 3 + 3)
        k, v = row.k[0, h // 3].double(), row.v[0, h // 3].double()
        weight = [(k @ q[0, g, 0].double() / 4).softmax(0) for g in group]
        mean = [sum(float(w[j]) for w in weight) / 3 for j in range(60)]
        always = [0, 1, *range(55, 60)]
        best = always + sorted((j for j in range(60) if j not in always), key=lambda j: -mean[j])[: n - len(always)]
        mine = weight[h % 3][best]
        right = mine @ v[best] / (mine.sum() if norm else 1)
        torch.testing.assert_close(out[0, h, 0].double(), right, atol=1e-5, rtol=1e-5)
        whole = weight[h % 3] @ v
        assert (right - whole).norm() <= 2 * (1 - mine.sum()) * v.norm(dim=1).max() + 1e-9
        score = k[best] @ q[0, h, 0].double() / 4
        torch.testing.assert_close(lse[0, h, 0].double(), score.logsumexp(0), atol=1e-5, rtol=1e-5)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 60, 333])
@pytest.mark.parametrize(
    "plan", [SPARSE, PAGES, SPARSE + ",values=int4", SPARSE + ",values=device", "dense+offload", "dense+kcache"]
)
def test_the_formula_is_what_the_receipt_counts(plan, n, llm_of):
    llm, room = llm_of("g3"), 7
    session = llm.session(room, plan=parse(f"full+{plan}"))
    session.start([text(n, seed=1)])
    report, fitted = session.report(), session.plans[0]
    assert report.bytes == math.ceil(3 * fitted.device_bytes(llm.config, torch.float32, n, room))
    assert report.host_bytes == 3 * fitted.host_bytes(llm.config, torch.float32, n, room)
    if n > 20 or "dense" in plan:
        assert (report.host_bytes > 0) == ("values" not in plan and "quest" not in plan)


@pytest.mark.parametrize("plan", [SPARSE, PAGES])
def test_the_formula_is_a_bound_where_chunks_grow(plan, llm_of):
    llm = llm_of("g3")
    session = llm.session(320, plan=parse(f"full+{plan},grow=10"))
    session.start([text(60, seed=1)])
    for t in text(300, seed=2):
        session.feed(torch.tensor([[t]]))
    report, fitted = session.report(), session.plans[0]
    most = [3 * f(llm.config, torch.float32, 60, 320) for f in (fitted.device_bytes, fitted.host_bytes)]
    assert 0.8 * most[0] < report.bytes <= most[0] and report.host_bytes <= most[1]


@pytest.mark.parametrize(("n", "least"), [(32768, 5.5), (65536, 6.0), (131072, 6.0)])
def test_device_bytes_of_llama_3_8b(n, least):
    """By the formula that the receipt has just been held to."""
    from nanokv.model.presets import PRESETS

    config, plan = PRESETS["llama3-8b"], parse("shadow")
    full = n * 2 * config.num_key_value_heads * config.head_dim * 2
    assert full / plan.device_bytes(config, torch.bfloat16, n, 0) >= least
