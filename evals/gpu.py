"""Measure nanokv on a GPU in stages. Each row is saved at once, because a borrowed card can disappear at any time.

`python -m evals.gpu --json results/gpu.json` runs every stage; `--stages` selects some. A stage that fails writes a
row with the error, and the next stage starts.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from evals import kernels as measure
from nanokv import load, parse
from nanokv.backends.check import ALWAYS, verdicts
from nanokv.engine import Session

MODEL = "llama3-8b"
SHORT_AND_LONG = [(MODEL, 1, 4096), (MODEL, 1, 32768)]
PLANS = ("full", "snapkv:budget=1024", "full+int4:group=128")
COMPRESSED = (
    *PLANS,
    "adakv:budget=1024",
    "keydiff:budget=1024",
    "expected:budget=1024",
    "compactor:budget=1024",
    "kvzip:budget=1024",
)


def ceilings() -> Iterator[dict]:
    """What the device can do."""
    yield {"name": "ceilings", **measure.ceilings()}


def attention() -> Iterator[dict]:
    """Attention of one layer, per call."""
    yield from measure.attention()


def steps() -> Iterator[dict]:
    """Decode steps of one row, at a short and a long context."""
    yield from measure.steps(read_rate(), SHORT_AND_LONG, PLANS)


def batches() -> Iterator[dict]:
    """Decode steps of eight rows."""
    yield from measure.steps(read_rate(), [(MODEL, 8, 16384)], PLANS)


def more() -> Iterator[dict]:
    """Decode steps of more plans."""
    plans = ("full", "streaming:budget=1024", "adakv:budget=1024", "full+int8:group=128", "full+fp8", "quest")
    yield from measure.steps(read_rate(), [(MODEL, 1, 32768)], plans)
    yield from measure.steps(read_rate(), [(MODEL, 1, 4096)], ("full", "h2o:budget=1024", "tova:budget=1024"))


def shadow() -> Iterator[dict]:
    """Decode steps of plans that keep keys or values on the host."""
    yield from measure.steps(read_rate(), [(MODEL, 1, 32768)], ("shadow", "offload"))


def default() -> Iterator[dict]:
    """Decode steps as they run without a flag."""
    yield from measure.steps(read_rate(), SHORT_AND_LONG, ("full",), backend="auto")


def plain() -> Iterator[dict]:
    """Decode steps in plain torch, without kernels, as one CUDA graph and by plain calls."""
    yield from measure.steps(read_rate(), SHORT_AND_LONG, PLANS, backend="sdpa")
    yield from measure.steps(read_rate(), SHORT_AND_LONG, ("full",), backend="sdpa", runner="eager")


def prefill() -> Iterator[dict]:
    """Prefill of one prompt, with what a policy does at its end, as they run without a flag."""
    llm = load(MODEL, random_weights=True, device="cuda")
    weights = torch.cuda.memory_allocated()
    for S in (4096, 32768):
        full, prompt = None, [torch.randint(0, 256, (S,), generator=torch.Generator().manual_seed(0)).tolist()]
        for text in COMPRESSED:
            row = {"model": MODEL, "slots": S, "plan": text, "backend": llm.models.ops.name}
            times = []
            try:
                plan = llm.ready(parse(text))
                for _ in range(3):  # the first one compiles
                    gc.collect()  # the session before may still hold memory
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    t0 = time.perf_counter()
                    session = Session(llm.models, plan, 64)
                    session.start(prompt)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - t0)
                    report = session.report()
                    del session
            except (ValueError, torch.cuda.OutOfMemoryError) as e:
                yield row | {"absent": str(e).splitlines()[0][:100]}
                continue
            seconds = median(times[1:])
            full = full or seconds
            peak = torch.cuda.max_memory_allocated() - weights
            yield row | {
                "seconds": seconds,
                "of_full": seconds / full,
                "peak_bytes": peak,
                "device_bytes": report.bytes,
            }


def check() -> Iterator[dict]:
    """What the check of the kernels says on this card, and how long it takes the first time."""
    with tempfile.TemporaryDirectory() as folder:
        t0 = time.perf_counter()
        names = (*ALWAYS, "attention_scores", "decode_quant", "decode_ragged", "quantize")
        found = verdicts(torch.device("cuda", 0), torch.bfloat16, (4, 128), names, Path(folder))
        yield {"name": "check", "seconds": time.perf_counter() - t0, "verdicts": found}


def tune() -> Iterator[dict]:
    """How each kernel is launched fastest: lines for kernels/tuning.py."""
    yield from measure.tune()


def peers() -> Iterator[dict]:
    """Decode steps of transformers on the same shape, with its growing cache and with its compiled static cache."""
    import transformers  # noqa: TID251
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache  # noqa: TID251

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for kind in ("dynamic", "static+compile"):
        for S in (4096, 32768):
            row = {
                "peer": "transformers",
                "version": transformers.__version__,
                "cache": kind,
                "model": MODEL,
                "slots": S,
            }
            try:
                cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=S + 200)
                seconds, prefill_s = _transformers_times(model, cache, S, kind != "dynamic")
                yield row | {"seconds": seconds, "prefill_s": prefill_s}
            except Exception as e:
                yield row | {"absent": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}


@torch.inference_mode()
def _transformers_times(model, cache, S: int, compiled: bool) -> tuple[float, float]:
    """Return the median seconds of a decode step after a prompt of S tokens, and those of the prompt itself."""
    ids = torch.randint(0, 256, (1, S), device="cuda")
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model
    model(ids, logits_to_keep=1)  # warm, with a cache of its own
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    out = model(ids, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    prefill_s = time.perf_counter() - t0
    token, times = out.logits[:, -1].argmax(-1, keepdim=True), []
    for i in range(80):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
            token = step(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True).clone()
        else:
            token = step(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        b.record()
        torch.cuda.synchronize()
        if i >= 16:
            times.append(a.elapsed_time(b) / 1e3)
    return median(times), prefill_s


STAGES = {
    f.__name__: f
    for f in (ceilings, check, attention, steps, default, prefill, batches, plain, peers, more, shadow, tune)
}
MEASURED: dict = {}


def read_rate() -> float:
    """Return the bytes per second that this card reads. It is measured once per process."""
    if not MEASURED:
        MEASURED.update(measure.ceilings())
    return MEASURED["read"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    try:
        measure.need_cuda()
    except ValueError as e:
        parser.error(str(e))
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit or None,
        "command": "python -m evals.gpu " + " ".join(sys.argv[1:]),
        "rows": [],
    }
    for name in args.stages:
        t0 = time.perf_counter()
        try:
            for row in STAGES[name]():
                MEASURED.update({k: v for k, v in row.items() if name == "ceilings" and k != "name"})
                record["rows"].append({"stage": name, **row})
                print(json.dumps(record["rows"][-1]), flush=True)
                args.json.write_text(json.dumps(record, indent=1))
        except Exception as e:  # the next stage is worth more than this traceback
            record["rows"].append({"stage": name, "failed": f"{type(e).__name__}: {str(e)[:300]}"})
            print(json.dumps(record["rows"][-1]), flush=True)
            import traceback

            traceback.print_exc()
        record["rows"].append({"stage": name, "took": time.perf_counter() - t0})
        args.json.write_text(json.dumps(record, indent=1))
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
