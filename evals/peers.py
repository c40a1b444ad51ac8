"""Our decode against transformers' on the same weights, prompt and machine, alternating in one run.

    python -m evals.peers --json results/cpu-decode.json

Rounds of eight steps in turn, so that each runner warms its own caches as in real use; medians, without the
first two of a round. The only module beside the tests that imports transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanokv import load
from weights.fetch import locate

TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDS, STEPS, WARM = 5, 8, 2


def ours(model: str, ids: list[int]) -> tuple[float, list[float], Callable]:
    """Prefill seconds, an empty list for step seconds, and a function that makes one step."""
    llm = load(model)
    session = llm.session(ROUNDS * STEPS + 1)
    t0 = time.perf_counter()
    logits = [session.start([ids])]
    first = time.perf_counter() - t0

    def step() -> None:
        logits[0] = session.feed(logits[0].argmax(-1)[:, None])

    return first, [], step


def transformers(model: str, ids: list[int], dtype: torch.dtype) -> tuple[float, list[float], Callable]:
    """The same with transformers' eager DynamicCache."""
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
    net = hf.AutoModelForCausalLM.from_pretrained(locate(model), dtype=dtype).eval()
    with torch.inference_mode():
        t0 = time.perf_counter()
        out = [net(torch.tensor([ids]), use_cache=True, logits_to_keep=1)]
        first = time.perf_counter() - t0

    def step() -> None:
        with torch.inference_mode():
            token = out[0].logits[:, -1:].argmax(-1)
            out[0] = net(token, past_key_values=out[0].past_key_values, use_cache=True)

    return first, [], step


def compare(model: str, length: int) -> dict:
    """Tokens per second of every runner at one context length."""
    llm_ids = load(model).tokenizer.encode("The quick brown fox jumps over the lazy dog. " * (length // 8))[:length]
    runs = {"nanokv": ours(model, llm_ids)} | {
        f"transformers {n}": transformers(model, llm_ids, t) for n, t in TYPES.items()
    }
    for _ in range(ROUNDS):
        for _, times, step in runs.values():
            for i in range(STEPS):
                t0 = time.perf_counter()
                step()
                if i >= WARM:
                    times.append(time.perf_counter() - t0)
    rows = {
        name: {"prefill_tok_s": length / first, "decode_tok_s": 1 / statistics.median(times)}
        for name, (first, times, _) in runs.items()
    }
    best = max(r["decode_tok_s"] for n, r in rows.items() if n != "nanokv")
    return {"length": length, "rows": rows, "decode_ratio": rows["nanokv"]["decode_tok_s"] / best}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    results = [compare(args.model, n) for n in args.lengths]
    for r in results:
        for name, row in r["rows"].items():
            print(
                f"{r['length']:6}  {name:24} prefill {row['prefill_tok_s']:7.0f} tok/s   decode {row['decode_tok_s']:6.1f} tok/s"
            )
        print(f"{r['length']:6}  decode, nanokv to the faster of transformers' types: {r['decode_ratio']:.2f}x")
    if args.json:
        import transformers as hf

        cpu = next(
            (x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
            platform.processor(),
        )
        facts = {
            "command": " ".join(["python -m evals.peers", *sys.argv[1:]]),
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "machine": f"{cpu.split(':')[-1].strip()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "transformers": hf.__version__,
            "dtype": load(args.model).dtypes,
        }
        Path(args.json).write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
