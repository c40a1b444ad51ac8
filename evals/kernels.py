"""Compare a GPU's kernels with the device's limits in one process: limits first, then attention, then decode steps.

A call is timed in a CUDA graph of many calls, whose buffers together are far larger than the L2 cache. A row whose
error against fp32 exceeds its tolerance says FAIL and has no time. All inputs are random normal, because zeros would
run faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanokv import load, parse
from nanokv.backends.base import Ops
from nanokv.backends.torch_ops import EAGER
from nanokv.backends.triton import triton_ops, tuning_table
from nanokv.engine import Session

D, CALLS, REPLAYS, L2 = 128, 20, 30, 60 << 20
# (KV heads, query heads per KV head, rows, slots): MHA and GQA, some too small to fill the device
SHAPES = [
    (8, 4, 1, 4096),
    (8, 4, 1, 16384),
    (8, 4, 1, 65536),
    (32, 1, 1, 4096),
    (32, 1, 1, 16384),
    (8, 4, 4, 16384),
    (8, 4, 8, 32768),
]
FORMATS = ("bf16", "int8", "int4", "int2")
TOLERANCE = {"bf16": 2e-2, "int8": 2e-2, "int4": 2e-2, "int2": 2e-2}
PLANS = (
    "full",
    "snapkv:budget=1024",
    "streaming:budget=1024",
    "simlayer:variant=light",
    "full+int4:group=128",
    "kvsharer",
)
STEPS = [
    ("llama3-8b", 1, 4096),
    ("llama3-8b", 1, 32768),
    ("llama3-8b", 8, 16384),
    ("llama2-7b", 1, 16384),
    ("mistral-7b", 1, 32768),
]  # (model, rows, tokens)


def need_cuda() -> None:
    """ValueError if there is no CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError(
            "bench.py kernels needs a CUDA device and there is none; run python bench.py speed on this one"
        )


def graph_times(calls: list[Callable[[], object]]) -> list[float]:
    """Return the seconds per call of each replay of one CUDA graph that holds all calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # compile and allocate workspaces before the capture
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for i in range(10 + REPLAYS):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        if i >= 10:
            times.append(a.elapsed_time(b) / 1e3 / len(calls))
    return times


def ceilings() -> dict[str, float]:
    """Return the device's limits.

    copy, read and host (to device) are bytes per second, where a copy counts reads and writes; matmul is bf16 FLOP/s;
    node is the seconds per node of a CUDA graph.
    """
    x, y = (torch.randn(2**30, device="cuda").to(torch.bfloat16) for _ in range(2))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    host, small = torch.empty(2**28, dtype=torch.uint8).pin_memory(), torch.zeros(1, device="cuda")
    found = {
        "copy": 2 * x.nbytes / median(graph_times([lambda: y.copy_(x)] * 3)),
        "read": x.nbytes / median(graph_times([lambda: x.sum()] * 3)),
        "matmul": 2 * 8192**3 / median(graph_times([lambda: a @ a] * 3)),
        "node": median(graph_times([lambda: small.add_(1)] * 200)),
    }
    target, times = host.cuda(), []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(host, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return found | {"host": host.nbytes / min(times)}


def attention() -> Iterator[dict]:
    """Time one layer's decode attention in every format, and torch's attention on the same bf16 keys."""
    ours = triton_ops(torch.device("cuda"))
    for heads, group, B, S in SHAPES:
        size = 2 * B * heads * S * D * 2
        copies = max(2, min(CALLS, 4 * L2 // size + 1))
        best = None
        for backend in (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ):
            row = _row(f"torch {backend.name.lower()}", heads, group, B, S, size)
            try:
                with sdpa_kernel(backend):
                    sets = [_random_inputs(B, heads, group, S, seed) for seed in range(copies)]
                    times = graph_times(
                        [
                            lambda x=sets[i % copies]: F.scaled_dot_product_attention(*x, enable_gqa=True)
                            for i in range(CALLS)
                        ]
                    )
            except RuntimeError as e:
                yield row | {"absent": str(e).splitlines()[0][:80]}
                continue
            best = min(filter(None, (best, median(times))))
            yield row | _times(times)
        for name in FORMATS:
            bits = {"bf16": 16, "int8": 8, "int4": 4, "int2": 2}[name]
            sets = [_attention_call(ours, bits, *_random_inputs(B, heads, group, S, seed)) for seed in range(copies)]
            must_read = sum(t.nbytes for t in sets[0][1])
            row = _row(f"nanokv {name}", heads, group, B, S, must_read)
            error = (sets[0][0]().float() - _reference(bits, *sets[0][1]).float()).abs().max().item()
            if not error <= TOLERANCE[name]:
                yield row | {"absent": f"FAIL: {error:.3g} from fp32"}
                continue
            times = graph_times([sets[i % copies][0] for i in range(CALLS)])
            yield row | _times(times) | {"error": error, "of_best": best / median(times)}
            del sets


def _row(name: str, heads: int, group: int, B: int, S: int, must_read: int) -> dict:
    return {"name": name, "kv_heads": heads, "group": group, "batch": B, "slots": S, "bytes": must_read}


def _times(times: list[float]) -> dict[str, float]:
    tenths = quantiles(times, n=10)
    return {"seconds": median(times), "p10": tenths[0], "p90": tenths[-1]}


def _random_inputs(B: int, heads: int, group: int, S: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B,H,1,D), k and v (B,Hkv,S,D)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (B, heads * group, 1, D), (B, heads, S, D), (B, heads, S, D)
    return tuple(torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes)


def _attention_call(
    ops: Ops, bits: int, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """Return an attention call and the tensors that it must read."""
    kpos, now = torch.zeros(k.shape[:3], dtype=torch.int32, device="cuda"), torch.zeros(k.shape[0], 1, device="cuda")
    if bits == 16:
        return lambda: ops.decode(q, k, v, None, kpos, now, None)[0], (q, k, v)
    codes = EAGER.quantize(k, bits, 128, 1), EAGER.quantize(v, bits, 1, D)
    return lambda: ops.decode_quant(q, *codes, None, kpos, now, None, (bits, bits))[0], (q, *codes[0], *codes[1])


def _reference(bits: int, q: Tensor, *stored: Tensor) -> Tensor:
    """Attention in fp32 over the stored keys and values."""
    k, v = stored if bits == 16 else (EAGER.dequantize(*stored[:3], bits), EAGER.dequantize(*stored[3:], bits))
    kpos, now = torch.zeros(k.shape[:3], dtype=torch.int32, device="cuda"), torch.zeros(k.shape[0], 1, device="cuda")
    return EAGER.decode(q.float(), k, v, None, kpos, now, None)[0]


def steps(
    limit: float,
    cases: Sequence[tuple[str, int, int]] = STEPS,
    plans: Sequence[str] = PLANS,
    backend: str = "triton",
    runner: str = "auto",
) -> Iterator[dict]:
    """Time decode steps with random weights, as one CUDA graph where that is possible unless the runner is another.

    `limit` is the bytes per second that the device reads. A case is (model, rows, tokens).
    """
    for model in dict.fromkeys(m for m, _, _ in cases):
        llm = load(model, random_weights=True, device="cuda", backend=backend, runner=runner)
        weights = sum(p.nbytes for p in llm.models.decode.parameters()) - llm.models.decode.embed_tokens.weight.nbytes
        for _, B, S in (s for s in cases if s[0] == model):
            first = None
            for text in plans:
                row = {"model": model, "batch": B, "slots": S, "plan": text}
                row |= {"backend": llm.models.ops.name, "runner": llm.models.runner.name}
                try:
                    plan = llm.ready(parse(text))
                    session = Session(llm.models, plan, 170)
                    prompts = [
                        torch.randint(0, 256, (S,), generator=torch.Generator().manual_seed(i)).tolist()
                        for i in range(B)
                    ]
                    token = session.start(prompts).argmax(-1, keepdim=True)
                    times = []
                    for i in range(144):
                        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        a.record()
                        token = session.feed(token).argmax(-1, keepdim=True)
                        b.record()
                        torch.cuda.synchronize()
                        if i >= 16:
                            times.append(a.elapsed_time(b) / 1e3)
                except (ValueError, torch.cuda.OutOfMemoryError) as e:
                    yield row | {"absent": str(e).splitlines()[0][:100]}
                    continue
                seconds, must_read = median(times), weights + session.report().used_bytes
                first = first or (seconds, must_read)
                cap = first[1] / must_read
                yield row | {
                    "seconds": seconds,
                    "tok_s": B / seconds,
                    "device_bytes": session.report().bytes,
                    "host_bytes": session.report().host_bytes,
                    "of_roof": must_read / seconds / limit,
                    "cap": cap,
                    "speedup": first[0] / seconds,
                }
        del llm
        torch.cuda.empty_cache()


def random_gemv() -> tuple[Tensor, Tensor]:
    """A row and a matrix of llama3-8b's width."""
    return tuple(torch.randn(n, 4096, device="cuda").to(torch.bfloat16) for n in (1, 4096))


def tune() -> Iterator[dict]:
    """Time every candidate for the table of kernels/tuning.py and return the fastest of each kernel. One that computes
    something else than the present entry is left out.
    """
    table, here = tuning_table(torch.device("cuda"))
    ours = triton_ops(torch.device("cuda"))
    sets = [_random_inputs(1, 8, 4, 16384, seed) for seed in range(8)]  # far more than the L2 holds
    calls = {
        "decode": [_attention_call(ours, 16, *x)[0] for x in sets],
        "decode_quant": [_attention_call(ours, 4, *x)[0] for x in sets],
        "decode_quant of 8 bits": [_attention_call(ours, 8, *x)[0] for x in sets],
        "linear": [partial(ours.linear, *random_gemv(), None) for _ in range(8)],
    }
    for name, of_name in calls.items():
        old, timed, right = table[name, here], [], of_name[0]().float()
        blocks, rows = ((512, 1024, 2048), (1, 2, 4, 8)) if name == "linear" else ((64, 128), (2, 3, 4, 6))
        for how in itertools.product(blocks, (2, 4, 8), (2, 3, 4), rows):
            table[name, here] = type(old)(*how)
            try:
                if torch.allclose(of_name[0]().float(), right, atol=2e-2, rtol=2e-2):
                    timed.append((median(graph_times([of_name[i % 8] for i in range(CALLS)])), how))
            except Exception:  # too large for this card's shared memory or registers
                continue
        table[name, here] = old
        seconds, best = min(timed, default=(None, old))
        yield {"kernel": name, "capability": here, "launch": best, "seconds": seconds, "tried": len(timed)}
