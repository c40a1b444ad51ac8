"""What only a GPU can show: kernels in bf16 against fp64, a captured step against plain calls, and that a step never waits.

`python -m pytest tests/gpu` on a machine with CUDA; skipped elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import kernels
from kernels import reference
from nanokv import load, parse
from nanokv.backends.check import FILE
from nanokv.backends.torch_cuda import TORCH_CUDA
from nanokv.engine import Session
from nanokv.runner import Eager, make

pytestmark = pytest.mark.gpu
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    dice = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=dice, device="cuda").to(dtype)


def truth(q, k, v, visible=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out, lse and weights (B,H,S) of one token in fp64; visible (B,Hkv,S) bool."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    score = (q.double() @ k.transpose(2, 3))[:, :, 0] * q.shape[3] ** -0.5
    if visible is not None:
        score = score.masked_fill(~visible.repeat_interleave(group, 1), -torch.inf)
    weight = score.softmax(-1).nan_to_num()
    return weight[:, :, None] @ v, score.logsumexp(-1, keepdim=True), weight


# of random normal numbers: weights and outputs are rounded to the type, logits by the queries' rounding
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


def assert_near(found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    assert not found.isnan().any()
    torch.testing.assert_close(found.double(), right, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "heads", "G", "S", "D"), [(1, 8, 4, 4096, 128), (3, 3, 3, 1000, 64), (2, 32, 1, 777, 128), (1, 2, 5, 33, 96)]
)
@pytest.mark.parametrize("window", [None, 300])
def test_decode(B, heads, G, S, D, window, dtype):
    q, k, v = (
        normal(B, n, s, D, dtype=dtype, seed=i) for i, (n, s) in enumerate(((heads * G, 1), (heads, S), (heads, S)))
    )
    length = torch.randint(0, S + 1, (B, heads), device="cuda", dtype=torch.int32)
    key_pos = torch.arange(S, device="cuda", dtype=torch.int32).expand(B, heads, S).contiguous()
    query_pos = torch.full((B, 1), S, device="cuda")
    visible = (key_pos < length[..., None]) & (key_pos > (S - window if window else -1))
    right = truth(q, k, v, visible)
    out, lse, scores = kernels.decode(q, k, v, length, key_pos, query_pos, window, "mean")
    assert_near(out, right[0], dtype)
    assert_near(lse, right[1], dtype)
    assert_near(scores, right[2].unflatten(1, (heads, G)).mean(2), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "runs"), [((4, 4), 1), ((4, 4), 4), ((2, 2), 4), ((8, 8), 1), ((8, 4), 2), ((4, 2), 1)]
)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_decode_quant(bits, runs, exact, counted, dtype):
    B, heads, G, S, D = 2, 4, 4, 1024, 128
    q, k, v = (
        normal(B, n, s, D, dtype=dtype, seed=i) for i, (n, s) in enumerate(((heads * G, 1), (heads, S), (heads, S)))
    )
    k, v = reference.quantize(k, bits[0], 64, 1), reference.quantize(v, bits[1], 1, D // runs)
    key_pos = torch.arange(S, device="cuda", dtype=torch.int32).expand(B, heads, S).contiguous()
    query_pos = torch.full((B, 1), S, device="cuda")
    length, more_length = key_pos % 3 > 0, torch.rand(B, heads, 100, device="cuda") > 0.3
    if counted:  # in whole groups
        length, more_length = (
            torch.randint(0, n, (B, heads), device="cuda", dtype=torch.int32) * m
            for n, m in ((S // 64 + 1, 64), (101, 1))
        )
    keys, values = reference.dequantize(*k, bits[0]), reference.dequantize(*v, bits[1])
    visible, exact_tokens = reference.slot_mask(length, key_pos), None
    if exact:
        more = [normal(B, heads, 100, D, dtype=dtype, seed=i) for i in (5, 6)]
        exact_tokens = *more, more_length, key_pos[:, :, :100]
        there = reference.slot_mask(more_length, key_pos[:, :, :100])
        keys, values, visible = (
            torch.cat((a, b), 2) for a, b in zip((keys, values, visible), (*more, there), strict=True)
        )
    right = truth(q, keys, values, visible)
    out, lse = kernels.decode_quant(q, k, v, length, key_pos, query_pos, None, bits, exact_tokens)
    assert_near(out, right[0], dtype)
    assert_near(lse, right[1], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_norm_and_gemv(dtype):
    q, k = normal(1, 32, 32, 128, dtype=dtype, seed=0), normal(1, 8, 3000, 128, dtype=dtype, seed=1)
    i = torch.arange(3000 - 32, 3000, device="cuda")[:, None]
    score = q.double() @ k.double().repeat_interleave(4, 1).transpose(2, 3) * 128**-0.5
    right = (
        score.masked_fill(torch.arange(3000, device="cuda") > i, -torch.inf)
        .softmax(-1)
        .sum(2)
        .unflatten(1, (8, 4))
        .mean(2)
    )
    assert_near(kernels.attention_scores(q, k, 3000 - 32, None, "mean"), right, dtype)
    x, w, gate = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((1, 1, 4096), (11008, 4096), (1, 1, 22016))))
    assert_near(kernels.linear(x, w / 64, None), x.double() @ (w / 64).double().T, dtype)
    a, b = gate.double().chunk(2, -1)
    assert_near(kernels.swiglu(gate), a * a.sigmoid() * b, dtype)
    right = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    ones = torch.ones(4096, device="cuda")
    assert_near(kernels.rms_norm(x, ones, 1e-5, dtype), right, dtype)
    angle = torch.randn(1, 1, 1, 64, device="cuda").repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin() * torch.tensor([-1.0, 1.0], device="cuda").repeat_interleave(64)
    heads = x.view(1, 1, 32, 128)
    low, high = heads.double().chunk(2, -1)
    swapped = torch.cat((high, low), -1)
    assert_near(kernels.rotate(heads, cos, sin), heads.double() * cos.double() + swapped * sin.double(), dtype)
    both, normed = kernels.add_rms_norm(x, x, ones, 1e-5, dtype)
    assert_near(both, 2 * x.double(), dtype)
    assert_near(normed, 2 * x.double() * ((2 * x.double()).square().mean(-1, keepdim=True) + 1e-5).rsqrt(), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_decode_ragged_and_kv_write(dtype):
    B, heads, G, D, n = 2, 4, 4, 128, [[900, 1, 0, 333], [64, 65, 700, 5]]
    q = normal(B, heads * G, 1, D, dtype=dtype, seed=0)
    length = torch.tensor(n, dtype=torch.int32, device="cuda")
    first = (length.flatten().cumsum(0) - length.flatten()).view(B, heads, 1)
    k, v = (normal(int(length.sum()), D, dtype=dtype, seed=i) for i in (1, 2))
    spans = list(zip(first.flatten().tolist(), length.flatten().tolist(), strict=True))
    key_pos, query_pos = torch.zeros(len(k), dtype=torch.int32, device="cuda"), torch.full((B, 1), 900, device="cuda")
    out, lse, scores = kernels.decode_ragged(q, k, v, spans, first, length, key_pos, query_pos, None, "each")
    for i, (a, m) in enumerate(spans):
        b, mine = i // heads, slice(i % heads * G, (i % heads + 1) * G)
        right = truth(q[b : b + 1, mine], k[None, None, a : a + m], v[None, None, a : a + m])
        assert_near(out[b : b + 1, mine], right[0], dtype)
        assert_near(lse[b : b + 1, mine], right[1], dtype)
        assert_near(scores[b : b + 1, mine, :m], right[2], dtype)

    k, v = (normal(B, 500, heads, D, dtype=dtype, seed=i).transpose(1, 2) for i in (1, 2))
    key_pos = torch.arange(500, device="cuda", dtype=torch.int32).expand(B, heads, 500).contiguous()
    index = torch.randint(-1, 500, (B, heads, 99), device="cuda")
    both = zip(kernels.compact(k, v, key_pos, index), reference.compact(k, v, key_pos, index), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    slots = [torch.zeros(B, heads, 9, D, dtype=dtype, device="cuda") for _ in range(4)]
    row = torch.arange(B * heads, device="cuda") * 9 + 3
    kernels.append(k[:, :, :1], v[:, :, :1], row, *slots[:2])
    reference.append(k[:, :, :1], v[:, :, :1], row, *slots[2:])
    assert torch.equal(slots[0], slots[2]) and torch.equal(slots[1], slots[3])
    for bits, tokens, channels in ((4, 64, 1), (2, 32, 1), (8, 1, 128), (4, 1, 32)):
        mine, right = (f(k[:, :, :448], bits, tokens, channels) for f in (kernels.quantize, reference.quantize))
        assert torch.equal(mine[2], right[2])
        # CUDA divides by a constant through its reciprocal and fuses sums: a scale may be the next fp16 number, or the one after
        torch.testing.assert_close(mine[1].float(), right[1].float(), rtol=2**-9, atol=0.0)
        blocks = reference.spread(mine[1].float()).expand(-1, -1, -1, tokens, -1, channels)
        half = blocks.flatten(-2).flatten(-3, -2) / 2
        error = (reference.dequantize(*mine, bits) - k[:, :, :448].float()).abs()
        assert bool((error <= half * (1 + 1e-4)).all())


@pytest.mark.parametrize("dtype", TYPES)
def test_shadowkv(dtype):
    """fetch_chunks reads values from host memory."""
    B, heads, G, D, C, c, rank = 2, 8, 4, 128, 500, 8, 160
    q, landmarks = normal(B, heads * G, 1, D, dtype=dtype, seed=0), normal(B, heads, C, D, dtype=dtype, seed=1)
    visible = torch.rand(B, heads, C, device="cuda") > 0.2
    score = truth(q, landmarks, landmarks, visible)[2].unflatten(1, (heads, G)).amax(2)
    assert_near(kernels.landmark_scores(q, landmarks, visible), score, dtype)
    a, b = normal(B, C, c, rank, dtype=dtype, seed=2), normal(B, heads, rank, D, dtype=dtype, seed=3) / rank**0.5
    inv_freq = 500000.0 ** -(torch.arange(0, D, 2, device="cuda") / D)
    first = torch.tensor([0, 120_000], dtype=torch.int32, device="cuda")
    chunk_ids = torch.rand(B, heads, C, device="cuda").argsort(-1)[:, :, :64].int()
    is_new, out = (
        torch.rand(B, heads, 64, device="cuda") > 0.5,
        torch.full((B, heads, 64, c * D), 7.0, dtype=dtype, device="cuda"),
    )
    kernels.rebuild_keys(a, b, inv_freq, first, chunk_ids, is_new, out)
    right = torch.full_like(out, 7.0, dtype=torch.float64)
    reference.rebuild_keys(a.double().float(), b.float(), inv_freq, first, chunk_ids, is_new, right)
    assert_near(out, right, dtype)
    far = torch.randn(B, heads, C, c * D).to(dtype).pin_memory()
    kernels.fetch_chunks(far, chunk_ids, is_new, out)
    there = far.cuda().gather(2, chunk_ids.long()[..., None].expand(-1, -1, -1, c * D))
    assert torch.equal(out[is_new], there[is_new]) and not torch.equal(out[~is_new], there[~is_new])


PLANS = [
    "full",
    "full+shadow:rank=64,outliers=8",
    "full+quest",
    "adakv:budget=128",
    "corm",
    "snapkv:budget=128",
    "streaming:sink=4,recent=60",
    "h2o:budget=128",
    "full+int4",
    "streaming:sink=4,recent=60+int4:group=16,residual=16",
    "snapkv:budget=128,every=40",
    "full+fp8",
    "full+kcache",
]


SPARSE = ("quest", "shadow", "kcache")  # a rounding may make a step choose another chunk


@pytest.fixture(autouse=True)
def waiting_is_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def llm():
    return load("llama3.2-1b", random_weights=True, device="cuda", backend="triton")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["graph", "compile"])
def test_the_fast_runners_give_the_logits_of_plain_calls_and_never_wait(plan, kind, llm):
    found, dice = [], torch.Generator().manual_seed(0)
    more = torch.randint(0, 200, (80, 1, 1), generator=dice).cuda()  # past two flushes of a group
    fast = make(kind, llm.models.decode)
    for runner in (Eager(llm.models.decode), fast, fast):  # compiling may wait, so its second round is looked at
        session = Session(replace(llm.models, runner=runner), parse(plan), 90)
        logits = [session.start([list(range(3, 203)) * 2])]
        session.cache.freeze()  # plain calls with the same shapes, and so the same order of sums
        for i, token in enumerate(more):
            if i > 3 and len(found) != 1:
                torch.cuda.set_sync_debug_mode("error")
            with torch.inference_mode():
                logits.append(runner.step(token, session.pos, session.cache))
                torch.cuda.set_sync_debug_mode("default")
                session.cache.room -= 1
                session._advance(1)
                session.cache.maintain(1, session.seen)
        found.append(torch.cat(logits).float())
    plain = found.pop(0)
    for one in found:
        if kind == "graph":  # a captured step is the same work
            assert torch.equal(plain, one)
            continue
        off = (plain - one).norm(dim=1) / plain.norm(dim=1)  # a compiled one orders sums otherwise
        assert (off > 0.05).float().mean() <= (0.1 if any(name in plan for name in SPARSE) else 0.0), off


@pytest.mark.parametrize(
    "plan", ["offload", "snapkv:budget=128+offload", "kcache:n=500", "full+shadow:rank=64,outliers=8"]
)
def test_what_lies_on_the_host_gives_the_same_logits(plan, llm):
    """Two rows, a turn of several tokens in between; shadow against itself with its values on the device."""
    here = parse(
        "full+shadow:rank=64,outliers=8,values=device"
        if "shadow" in plan
        else plan.replace("+offload", "").replace("kcache:n=500", "full")
    )
    found = []
    for one in (here if plan != "offload" else parse("full"), parse(plan)):
        session = Session(replace(llm.models, runner=Eager(llm.models.decode)), one, 60)
        logits = [session.start([list(range(3, 203)) * 2, list(range(9, 209)) * 2])]
        for n in (1, 1, 5, 1, 1, 1):
            logits.append(session.feed(torch.arange(10, 10 + n, device="cuda").expand(2, n)))
        found.append(torch.cat(logits).float())
        assert (session.report().host_bytes > 0) == (one == parse(plan))
    close = 0.0 if "kcache" not in plan else 0.1
    torch.testing.assert_close(*found, atol=close, rtol=close)


# ---- plain torch, and what a user gets without a flag ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("B", "heads", "G", "S"), [(1, 8, 4, 4100), (3, 3, 3, 1000), (1, 2, 5, 33)])
@pytest.mark.parametrize("window", [None, 300])
def test_plain_torch_decodes(B, heads, G, S, window, dtype):
    """K and V are slices of a larger capacity, cut into ranges that do not divide it."""
    q = normal(B, heads * G, 1, 128, dtype=dtype, seed=0)
    k, v = (normal(B, heads, S + 60, 128, dtype=dtype, seed=i)[:, :, :S] for i in (1, 2))
    key_pos = torch.stack([torch.randperm(S, device="cuda") for _ in range(B * heads)]).view(B, heads, S).int()
    query_pos = torch.full((B, 1), S, device="cuda")
    for length in (None, torch.randint(0, S + 1, (B, heads), device="cuda", dtype=torch.int32)):
        seen = torch.ones_like(key_pos, dtype=torch.bool)
        if length is not None:
            seen = torch.arange(S, device="cuda") < length[..., None]
        seen = seen if window is None else seen & (key_pos > S - window)
        out, lse, _ = TORCH_CUDA.decode(q, k, v, length, key_pos, query_pos, window)
        right = truth(q, k, v, seen)
        assert_near(out, right[0], dtype)
        assert_near(lse, right[1], dtype)
        scores = TORCH_CUDA.decode(q, k, v, length, key_pos, query_pos, window, "mean")[2]
        assert_near(scores, right[2].unflatten(1, (heads, G)).mean(2), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_plain_torch_runs_chunks_and_turns(window, dtype):
    q, (k, v) = (
        normal(2, 8, 70, 128, dtype=dtype, seed=0),
        (normal(2, 2, 300, 128, dtype=dtype, seed=i) for i in (1, 2)),
    )
    ask = q, k, v, 230, window
    right = reference.prefill(*(x.double() if isinstance(x, torch.Tensor) else x for x in ask))
    out, lse = TORCH_CUDA.turn(*ask)
    assert_near(out, right[0], dtype)
    assert_near(lse, right[1].double(), dtype)
    assert_near(TORCH_CUDA.prefill(*ask), right[0], dtype)


def test_without_a_flag_kernels_are_checked_and_a_graph_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOKV_WEIGHTS", str(tmp_path))
    llm = load("llama3.2-1b", random_weights=True)
    assert (llm.models.ops.name, llm.models.ops.why, llm.models.runner.name) == ("triton", "kernels checked", "graph")
    assert (tmp_path / FILE).is_file()


def test_a_kernel_that_fails_is_told_and_plain_torch_runs(monkeypatch):
    wrong = {"decode": "is off by 0.3 where 0.02 is allowed"}
    monkeypatch.setattr("nanokv.llm.verdicts", lambda device, dtype, shape, names, *_: dict.fromkeys(names, "") | wrong)
    llm = load("llama3.2-1b", random_weights=True)
    assert (
        llm.models.ops.why == "kernel decode is off by 0.3 where 0.02 is allowed" and llm.models.runner.name == "graph"
    )
    session = llm.session(4)
    session.start([list(range(3, 203))])
    assert session.feed(torch.tensor([[5]], device="cuda")).isfinite().all()
