"""The blocks of the pages that are made from data: `python -m evals.tables` writes them anew, and a test compares.

A block stands between `<!-- table: NAME -->` and `<!-- end -->`. Its content comes from results/, from the registries, or
from `docs.trace`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from docs import trace
from evals.show import percent
from nanokv import parse
from nanokv.model.presets import PRESETS
from nanokv.policies import POLICIES
from nanokv.stores import STORES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])


def _read(name: str, machine: str = "xeon-amx") -> dict[str, Any]:
    return json.loads((RESULTS / machine / name).read_text(encoding="utf-8"))


def compatible() -> str:
    """Which policies run in which stores, by the check of `Plan`.

    tests/stores/test_stores.py runs every pair, and tests/stores/test_chunked.py the stores on the host.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for keep, policy in POLICIES.items():
        rows.setdefault(tuple(n for n, store in STORES.items() if not store.incompatible_policy(policy)), []).append(
            f"`{keep}`"
        )
    head = ["policies", *(f"`{n}`" for n in STORES)]
    return markdown(
        head, [[" ".join(names), *("✓" if n in good else "–" for n in STORES)] for good, names in rows.items()]
    )


def quality() -> str:
    """Mean scores over tasks, and fidelity, at the smallest length that has all tasks."""
    return _scores(_read("quality.json"))


def stores() -> str:
    """The same table for stores that round, alone and under policies."""
    return _scores(_read("stores.json"))


def rows() -> str:
    """The same table at 1,000 tokens, for the methods that came last beside some older ones."""
    return _scores(_read("rows-1000.json", "epyc"))


def rows_qwen() -> str:
    """The same on the larger model, with the policies that came after them."""
    return _scores(_read("rows-qwen-1000.json", "epyc"))


def without_question() -> str:
    """The policies that judge a prompt without its question, on a 0.5B model."""
    return _scores(_read("values-1000.json", "epyc"))


def without_question_long() -> str:
    """The same on texts of 4,096 tokens."""
    return _scores(_read("values-4096.json", "epyc"))


def tenth() -> str:
    """A tenth of 4,096 tokens, on 20 texts."""
    return _scores(_read("tenth-4096.json", "epyc"))


def long_16384() -> str:
    """A quarter of 16,384 tokens, on four texts."""
    return _scores(_read("long-16384.json", "epyc"))


def few_bytes() -> str:
    """KVzip with values counted, and with more tokens of fewer bits."""
    return _scores(_read("few-bytes-1000.json", "epyc"))


def frontier() -> str:
    """For each share of a dense cache's bytes, the plan that solves most within it, under each protocol."""
    (found,) = _read("pareto-2000.json", "epyc")["averages"].values()
    dense = found["full"]["bytes"] * found["full"]["ratio"]
    rows = []
    for share in FRONTIER:
        within = {name: a for name, a in found.items() if a["bytes"] <= share * dense}
        cells = []
        for key in ("aware", "agnostic", "turn2"):
            best = max(within, key=lambda name: (within[name][key], -within[name]["bytes"]))
            size = percent(within[best]["bytes"] / dense)
            cells.append(f"`{_as_plan(best)}` with {size}: {percent(within[best][key])}")
        rows.append([percent(share), *cells])
    return markdown(["bytes, at most", "aware", "agnostic", "turn 2"], rows)


def pareto() -> str:
    """All plans of that run."""
    return _scores(_read("pareto-2000.json", "epyc"))


FRONTIER = (0.6, 0.14, 0.1, 0.07)  # shares of a dense cache's bytes


def finishers() -> str:
    """Policies whose kept values take over a part of what was evicted."""
    return _scores(_read("finish-1000.json", "epyc"))


def auto() -> str:
    """--policy auto beside the plans that it tries: same next token and KL, per kind of text."""
    found = _read("auto.json", "epyc")["auto"]
    rows = []
    for name in found[0]["plans"]:
        each = [r["plans"][name] for r in found]
        rows.append([f"`{name}`", *(c for x in each for c in (f"{x['same']:.1%}", f"{x['kl']:.3f}"))])
    took = ["prefills that its trial took", *(c for r in found for c in (f"{r['prefills']:.2f}", "–"))]
    return markdown(["plan", *(c for r in found for c in (f"{r['kind']}: same top", "KL"))], [*rows, took])


def tuned_bits() -> str:
    """Bits by layer beside the same bits in all layers, on two models."""
    found = {model: _read(f"tuned-{model}.json", "epyc") for model in ("smollm2-135m", "qwen2.5-coder-0.5b")}
    plans, rows = [f["plan"] for f in found["smollm2-135m"]["fidelity"] if f["plan"].startswith("full")], []
    for plan in plans:
        cells = [f"`{plan}`"]
        for of_model in found.values():
            fidelity = next(f for f in of_model["fidelity"] if f["plan"] == plan)
            size = of_model["averages"]["1000"][plan]["bytes"] / 2**20
            cells += [f"{size:.1f} MiB", f"{fidelity['kl_mean']:.4f}", f"{fidelity['top1']:.1%}"]
        rows.append(cells)
    of_each = [f"{model}: {what}" for model in ("smollm2-135m", "0.5B") for what in ("cache", "KL", "same top")]
    return markdown(["plan", *of_each], rows)


def codes() -> str:
    """The error that rounding makes in the keys and values of a text."""
    rows = []
    for f in _read("codes.json")["codes"]:
        cells = [f"{f[f'{x}_bits']:.2f}" for x in "kv"] + [
            f"{f[f'{x}_{y}']:.5f}" for x in "kv" for y in ("mse", "worst")
        ]
        rows.append([f"`{f['plan'].removeprefix('full+')}`", *cells])
    return markdown(["store", "K bits", "V bits", "K error", "worst layer", "V error", "worst layer"], rows)


def paces() -> str:
    """Decode speed of stores that round, against the full cache in the same run."""
    return _paces("stores-speed.json")


def sparse() -> str:
    """Decode speed of plans that read few tokens per step."""
    return _paces("shadow-speed.json")


def codes_compiled() -> str:
    """Decode speed over rounded caches with compiled blocks, at two lengths."""
    return _by_length(_read("codes-compiled.json", "epyc-zen5")["speed"])


def _paces(file: str) -> str:
    found = _read(file)["speed"]
    full = next(f for f in found if f["plan"] == "full")
    rows = [
        [
            f"`{f['plan']}`",
            f"{f['decode_tok_s']:.1f}",
            f"{f['decode_tok_s'] / full['decode_tok_s']:.2f}",
            f"{f['bytes'] / 2**20:.1f} MiB",
        ]
        for f in found
        if f["length"] == full["length"]
    ]
    return markdown(["plan", "tokens/s", "of full's", "cache"], rows)


def compiled() -> str:
    """Decode speed with compiled blocks, against the full cache in the same run."""
    return _by_length([f for file in ("speed-compiled.json", "speed-8000.json") for f in _read(file)["speed"]])


def _by_length(found: list[dict]) -> str:
    rows = []
    for f in found:
        full = next(x for x in found if x["plan"] == "full" and x["length"] == f["length"])
        of = f["decode_tok_s"] / full["decode_tok_s"]
        size = f"{f['bytes'] / 2**20:.1f} MiB"
        rows.append([f"`{f['plan']}`", str(f["length"]), f"{f['decode_tok_s']:.1f}", f"{of:.2f}", size])
    return markdown(["plan", "tokens", "tokens/s", "of full's", "cache"], rows)


def _scores(found: dict[str, Any]) -> str:
    length = min(
        (n for n in found["averages"]), key=lambda n: (-sum(str(p["length"]) == n for p in found["quality"]), int(n))
    )
    rows = []
    for name, a in found["averages"][length].items():
        f = next(x for x in found["fidelity"] if x["plan"] == name and str(x["length"]) == length)
        size = [f"{a['bytes'] / 2**20:.1f} MiB", f"{a['ratio']:.1f}x"]
        fidelity = [f"{f['kl_mean']:.3f}", percent(f["top1"]), f"{f['ppl'] / f['ppl_full'] - 1:+.1%}"]
        rows.append([f"`{name}`", *size, *(percent(a[k]) for k in ("aware", "agnostic", "turn2")), *fidelity])
    head = ["plan", "cache", "less by", "aware", "agnostic", "turn 2", "KL", "same top", "perplexity"]
    return markdown(head, rows)


def decode() -> str:
    """Tokens per second of nanokv and the other programs on two cores with AMX."""
    return _decode(_read("peers.json")["peers_speed"])


def decode_without_amx() -> str:
    """The same on two cores that have bf16 products and no AMX."""
    return _decode(_read("peers.json", "epyc")["peers_speed"])


def decode_compiled() -> str:
    """Two cores of a Zen 5, since prompts and compiled steps have products of their own: a process for each length."""
    files = ("peers-lines-512.json", "peers-lines-4096.json")
    return _decode([r for file in files for r in _read(file, "epyc-zen5")["peers_speed"]])


def decode_qwen() -> str:
    """The same machine, and a model that reads four times as many bytes of weights."""
    return _decode(_read("peers-qwen-4096.json", "epyc-zen5")["peers_speed"])


def decode_qwen_16384() -> str:
    """The same model at 16,384 tokens, with the full cache and with 1,024 tokens of it."""
    return _decode(_read("peers-lines-16384.json", "epyc-zen5")["peers_speed"])


def decode_16384() -> str:
    """smollm2-135m at 16,384 tokens on the Zen 4, with the full cache and with 1,024 tokens of it."""
    return _decode(_read("peers-16384.json", "epyc")["peers_speed"])


def _decode(found: list[dict]) -> str:
    lengths = sorted({r["length"] for r in found})
    rows = []
    for name in dict.fromkeys(r["name"] for r in found if "absent" not in r):
        by_length = {r["length"]: r for r in found if r["name"] == name}
        cells = []
        for n in lengths:
            if (r := by_length.get(n)) is None:  # llama.cpp's best setting differs from length to length
                cells += ["–"] * 3
                continue
            size = f"{r['bytes'] / 2**20:.1f} MiB" if "bytes" in r else "–"
            read = f" ({r['read_s'] / 1e9:.1f})" if "read_s" in r else ""
            cells += [f"{n / r['prefill_s']:.0f}", f"{r['decode_tok_s']:.1f}{read}", size]
        rows.append([name, *cells])
    return markdown(["", *(x for n in lengths for x in (f"prefill {n}", f"decode at {n}", "cache"))], rows)


def pays() -> str:
    """After how many tokens compiled steps have made up for the seconds of compiling."""
    rows = []
    for length in (512, 4096):
        for r in _read(f"compile-{length}.json", "epyc-zen5")["compile"]:
            step = [f"{r[k]:.1f}" for k in ("eager_ms", "compiled_ms", "cold_s")]
            tokens = 1e3 * r["cold_s"] / (r["eager_ms"] - r["compiled_ms"])
            rows.append([f"`{r['plan']}`", str(length), *step, f"{tokens:,.0f}"])
    return markdown(["plan", "prompt", "plain step, ms", "compiled", "compiling, s", "pays after tokens"], rows)


def kvpress() -> str:
    """Scores of nanokv and kvpress at equal settings, for the methods that both have."""
    return _kvpress(_read("kvpress.json")["peers_quality"])


def kvpress_qwen() -> str:
    """The same on a larger model, with methods that need no question."""
    return _kvpress(_read("kvpress-qwen-1000.json", "epyc")["peers_quality"])


def _kvpress(found: list[dict]) -> str:
    rows = []
    for r in found:
        if "ours_aware" not in r:
            continue
        pairs = [f"{percent(r[f'ours_{q}'])} / {percent(r[f'theirs_{q}'])}" for q in ("aware", "agnostic")]
        size = " / ".join(f"{r[f'{who}_bytes'] / 2**20:.1f}" for who in ("ours", "theirs"))
        rows.append([r["task"], r["name"], *pairs, size])
    return markdown(["task", "method", "aware: nanokv / kvpress", "agnostic", "cache, MiB"], rows)


def ruler() -> str:
    """Tasks beside the needles on a larger model. A plan has no score in a task that full does not solve."""
    parts = _read("ruler-1000.json", "epyc")["quality"]
    rows = []
    for name in dict.fromkeys(name for part in parts for name in part["plans"]):
        cells = []
        for part in parts:
            plan = part["plans"].get(name)
            scores = [*(plan[q]["score"] for q in ("aware", "agnostic")), plan["aware"]["turn2"]] if plan else []
            cells.append(" / ".join(map(percent, scores)) or "–")
        rows.append([f"`{name}`", *cells])
    return markdown(["plan", *(f"`{part['task']}`" for part in parts)], rows)


def long_answers() -> str:
    """Policies that hold their size over a long answer, compared with the full cache on the text that follows."""
    few, more = (_read(f"answers-{n}.json", "epyc")["fidelity"] for n in (500, 512))
    rows = [
        [f"`{r['plan']}`", f"{r['kl_mean']:.3f}", percent(r["top1"]), f"{r['ppl'] / r['ppl_full'] - 1:+.1%}"]
        for r in (*few, *more[2:])  # without full again, and without random 512, which evicts nothing of 500 tokens
    ]
    return markdown(["plan", "KL", "same top", "perplexity"], rows)


def needles() -> str:
    """Every policy on needles of one length. A plan that was run twice counts with its second result."""
    plans = {}
    for file in ("needles-2000.json", "keyformer-2000.json"):
        plans |= _read(file)["quality"][0]["plans"]
    return _needles(plans)


def needles_qwen() -> str:
    """The same of a larger model and a longer text; `keyformer` ran by itself."""
    plans, alone = (_read(f"{name}-qwen-4000.json", "epyc")["quality"][0]["plans"] for name in ("needles", "keyformer"))
    return _needles(plans | {"keyformer 25%": alone["keyformer 25%"]})


def _needles(plans: dict[str, Any]) -> str:
    rows = []
    for name, plan in plans.items():
        a = plan["aware"]
        size = [f"{a['bytes'] / 2**20:.1f} MiB", f"{a['full_bytes'] / a['bytes']:.1f}x"]
        rows.append([f"`{name}`", *size, percent(a["score"]), percent(plan["agnostic"]["score"]), percent(a["turn2"])])
    return markdown(["plan", "cache", "less by", "aware", "agnostic", "turn 2"], rows)


def middle() -> str:
    """Needles in the middle, of the texts that full solves, for plans that keep all tokens and read few of them."""
    rows = []
    for name, plan in _read("middle-4000.json")["quality"][0]["plans"].items():
        a, b = plan["aware"], plan["agnostic"]
        size = [f"{a[k] / 2**20:.1f} MiB" for k in ("bytes", "host_bytes")]
        found = [f"{n} of {of}" for n, of in (a["of_full"][0], b["of_full"][0], a["of_full"][1], b["of_full"][1])]
        rows.append([f"`{name}`", *size, *found])
    return markdown(["plan", "on the device", "host", "aware", "agnostic", "turn 2", "after agnostic"], rows)


def ranks() -> str:
    """The loss from the rank of shadow's keys alone: every chunk is read, so nothing else is lost."""
    found, rows = _read("ranks.json"), []
    for name, plan in found["quality"][0]["plans"].items():
        if name == "full" or name.startswith("shadow"):
            f = next(x for x in found["fidelity"] if x["plan"] == name)
            solved = [f"{n} of {of}" for n, of in (plan[q]["of_full"][0] for q in ("aware", "agnostic"))]
            rows.append(
                [f"`{name.split(',')[0]}`", f"{f['kl_mean']:.4f}", f"{f['kl_p99']:.3f}", percent(f["top1"]), *solved]
            )
    return markdown(["plan", "KL", "99%", "same top", "aware", "agnostic"], rows)


def placed() -> str:
    """MiB on the device by prompt length, and the ratio to dense. Tests check the formula against the receipt."""
    rows = []
    for model in ("smollm2-135m", "llama3-8b"):
        config = PRESETS[model]
        for text in ("shadow", "shadow:chunk=4", "shadow:values=int4", "quest", "kcache", "offload"):
            cells = []
            for n in (4096, 32768, 65536):
                size = config.num_hidden_layers * parse(text).device_bytes(config, torch.bfloat16, n, 0)
                full = config.num_hidden_layers * n * 2 * config.num_key_value_heads * config.head_dim * 2
                cells.append(f"{size / 2**20:,.0f} ({full / size:.1f}x)")
            rows.append([model, f"`{text}`", *cells])
    return markdown(["model", "plan", "4,096", "32,768", "65,536"], rows)


def drafts() -> str:
    """Speculative decoding under the full cache."""
    rows = []
    for file in ("drafts.json", "drafts-second.json"):
        for r in _read(file, "epyc-zen5")["drafts"]:
            rates = [f"{r['plain_tok_s']:.1f}", f"{r['tok_s']:.1f}", f"{r['tok_s'] / r['plain_tok_s']:.2f}x"]
            right = percent(r["accepted"] / max(1, r["drafted"]))
            per_pass = f"{1 + r['accepted'] / r['passes']:.2f}"
            rows.append([f"`{r['draft']}`", r["kind"], f"{r['same']} of {r['texts']}", right, per_pass, *rates])
    head = ["draft", "text", "same tokens", "accepted", "tokens a pass", "tokens/s without", "with", "gain"]
    return markdown(head, rows)


def endless() -> str:
    """Speed and bytes near the start and at the end of long runs."""
    rows = []
    for f in (f for file in ("endless.json", "endless-snapkv.json") for f in _read(file)["endless"]):
        early, late = f["early_tok_s"], f["late_tok_s"]
        sizes = [f"{f['bytes'][i] / 2**20:.1f} MiB" for i in (0, -1)]
        rows.append(
            [f"`{f['plan']}`", f"{early:.1f}", f"{late:.1f}", f"{late / early - 1:+.1%}", *sizes, str(max(f["held"]))]
        )
    return markdown(["plan", "tok/s early", "late", "change", "cache early", "late", "most tokens a head held"], rows)


def prose() -> str:
    """Perplexity of a text longer than the context, and of a shorter one under shared layers."""
    return _prose([_read("prose.json"), _read("share.json")])


def prose_past_context() -> str:
    """The same with positions that repeat, beside the positions of the text."""
    return _prose([_read(f"prose-{n}.json", "epyc") for n in (12288, 32768)])


def _prose(files: Sequence[dict[str, Any]]) -> str:
    rows = []
    for found in (file["prose"] for file in files):
        for f in found:
            rows.append(
                [f"`{f['plan']}`", str(f["tokens"]), f"{f['ppl']:.2f}", f"{f['ppl'] / found[0]['ppl'] - 1:+.1%}"]
            )
    return markdown(["plan", "tokens", "perplexity", "against full"], rows)


def fuzz() -> str:
    """What became of damaged files of each kind: before the loaders were hardened, and since."""
    found, rows = _read("fuzz.json", "epyc"), []
    before, after = found["before"]["counts"], found["after"]["counts"]
    for name, now in after.items():
        cells = [str(now.get(outcome, 0)) for outcome in OUTCOMES]
        then = [f"{before[name][x]} {x}" for x in FAULTS if before[name].get(x)]
        rows.append([name, *cells, ", ".join(then) or "–"])
    return markdown(["file", *OUTCOMES, "faults before"], rows)


def launches() -> str:
    """What one decode step asks of a GPU: kernel launches and new tensors, per layer."""
    found, rows = _read("launches.json", "epyc"), {}
    before = {(r["plan"], r["backend"]): r for r in found["before"]["launches"]}
    for r in found["launches"]:
        cells = rows.setdefault(r["plan"], [f"`{r['plan']}`"])
        old = before[r["plan"], r["backend"]]
        if "waits" in r:
            cells += ["waits for the host", "–"]
            continue
        numbers = [[x.get("launches_per_layer"), x.get("allocated_per_layer", 0) / 1024] for x in (r, old)]
        for now, then in zip(*numbers, strict=True):
            cells.append(f"{now:,.0f} ({then:,.0f})" if then else f"{now:,.0f} (waited)")
    head = ["plan", "kernels: launches a layer", "KiB allocated", "plain torch: launches a layer", "KiB allocated"]
    return markdown(head, list(rows.values()))


def machine_code() -> str:
    """Of every kernel, as it is launched, for three architectures."""
    found = _read("aot.json", "epyc")["architectures"]
    rows = []
    for name in found["90"]:
        cells = []
        for arch in ("80", "89", "90"):
            m = found[arch].get(name)
            if m is None:
                cells.append("–")
                continue
            each = f", {m['per_token']:.1f}" if m["per_token"] and name.split()[-1].startswith("_decode") else ""
            cells.append(f"{m['registers']}, {m['shared']:,}{each}")
        rows.append([f"`{name}`", *cells])
    return markdown(["kernel", "sm_80", "sm_89", "sm_90"], rows)


def _gpu_rows(stage: str, name: str = "kernels.json") -> list[dict]:
    """The rows of one stage in all runs on the GPU, the oldest first."""
    return [
        row | {"commit": run["commit"]}
        for run in _read(name, "h200")["runs"]
        for row in run["rows"]
        if row["stage"] == stage and "took" not in row
    ]


def gpu_steps() -> str:
    """Decode steps: tokens/s and share of what reading the weights and the cache takes; in brackets an earlier state."""
    older = {(r["plan"], r["batch"], r["slots"]): r for s in ("steps", "batches") for r in _gpu_rows(s, "steps.json")}
    plain, rows = {(r["plan"], r["slots"], r.get("runner", "eager")): r for r in _gpu_rows("plain")}, []
    for r in [*_gpu_rows("steps"), *_gpu_rows("batches")]:
        old, alone = older[r["plan"], r["batch"], r["slots"]], r["batch"] == 1
        graph, eager = (plain.get((r["plan"], r["slots"], how)) if alone else None for how in ("graph", "eager"))
        cells = [f"`{r['plan']}`", f"{r['batch']} x {r['slots']:,}", f"{r['tok_s']:,.0f} ({old['tok_s']:,.0f})"]
        cells += [f"{r['of_roof']:.0%} ({old['of_roof']:.0%})", f"{r['speedup']:.2f}x of {r['cap']:.2f}x"]
        rows.append(cells + [f"{x['tok_s']:.0f}" if x else "–" for x in (graph, eager)])
    head = ["plan", "rows x tokens", "tokens/s", "of the roof", "against `full`, of what its bytes allow"]
    return markdown([*head, "plain torch in a graph", "plain torch by calls"], rows)


def gpu_prefill() -> str:
    """Prefill with what a policy does at its end; in brackets before waits for the device were removed."""
    found = {(r["plan"], r["slots"], r["commit"]): r for r in _gpu_rows("prefill")}
    before, after = sorted({commit for _, _, commit in found}, key=lambda c: c != "84dd50c")
    rows = []
    for plan in dict.fromkeys(plan for plan, _, _ in found):
        cells = [f"`{plan}`"]
        for slots in (4096, 32768):
            new, old = (found[plan, slots, commit] for commit in (after, before))
            cells += [
                f"{new['seconds']:.3f} ({old['seconds']:.3f})",
                f"{new['of_full']:.2f}x ({old['of_full']:.2f}x)",
            ]
        rows.append([*cells, f"{new['device_bytes'] / 2**30:.2f}"])
    head = ["plan", "4,096 tokens, s", "of `full`", "32,768 tokens, s", "of `full`", "cache then, GiB"]
    return markdown(head, rows)


def gpu_attention() -> str:
    """Attention of one layer and one token, against torch's fastest kernel on 16-bit keys."""
    found: dict[tuple, dict] = {}
    for r in _gpu_rows("attention"):
        found.setdefault((r["kv_heads"], r["group"], r["batch"], r["slots"]), {})[r["name"]] = r
    rows = []
    for (heads, group, batch, slots), by in found.items():
        if "nanokv bf16" not in by:  # the run ended here
            continue
        best = min((r["seconds"] for name, r in by.items() if name.startswith("torch") and "seconds" in r))
        cells = [f"{heads} x {group}", f"{batch} x {slots:,}", f"{1e6 * best:.1f}"]
        cells += [f"{1e6 * by[f'nanokv {f}']['seconds']:.1f}" for f in ("bf16", "int8", "int4", "int2")]
        rows.append(cells)
    return markdown(["KV heads x G", "rows x tokens", "torch's best, us", "bf16", "int8", "int4", "int2"], rows)


FAULTS = ("silent", "hang", "blow-up", "crash", "traceback", "unsaid")
OUTCOMES = ("refused", "equal", "different", *FAULTS)


def summary() -> str:
    """For the README: ten plans on the same texts."""
    found = _read("stores.json")
    averages, (length,) = found["averages"], {str(f["length"]) for f in found["fidelity"]}
    rows = []
    for name in SUMMARY:
        a = averages[length][name]
        f = next(x for x in found["fidelity"] if x["plan"] == name)
        cells = [f"{a['bytes'] / 2**20:.1f} MiB", f"{a['ratio']:.1f}x", percent(a["aware"]), percent(a["agnostic"])]
        rows.append([f"`{_as_plan(name)}`", *cells, percent(f["top1"])])
    return markdown(["plan", "cache", "smaller by", "question known", "question later", "same next token"], rows)


SUMMARY = (
    "full", "full+int8", "full+int4", "snapkv:window=8,kernel=13 25%", "snapkv:window=8,kernel=13+int4 25%",
    "snapkv:window=8,kernel=13,demote=true 25%", "simlayer", "zipcache", "streaming 25%", "random 25%",
)  # fmt: skip


def _as_plan(name: str) -> str:
    """A row's name such as `snapkv:window=8+int4 25%` as the plan that the user types."""
    text, _, budget = name.partition(" ")
    policy, plus, store = text.partition("+")
    if budget:
        policy += f"{',' if ':' in policy else ':'}budget={budget}"
    return policy + plus + store


def _trace(plan: str) -> str:
    lines: list[str] = []
    trace.run(plan, lines.append)
    return "\n".join(["```text", *lines, "```"])


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        summary,
        compatible,
        quality,
        stores,
        without_question,
        without_question_long,
        tenth,
        long_16384,
        few_bytes,
        frontier,
        pareto,
        codes_compiled,
        finishers,
        auto,
        codes,
        paces,
        sparse,
        decode,
        decode_without_amx,
        decode_compiled,
        decode_qwen,
        decode_qwen_16384,
        decode_16384,
        tuned_bits,
        compiled,
        pays,
        kvpress,
        kvpress_qwen,
        ruler,
        long_answers,
        needles,
        needles_qwen,
        rows,
        rows_qwen,
        prose_past_context,
        middle,
        ranks,
        placed,
        fuzz,
        launches,
        machine_code,
        gpu_steps,
        gpu_prefill,
        gpu_attention,
        drafts,
        endless,
        prose,
    )
} | {f"trace {name}": lambda name=name: _trace(name) for name in trace.PLANS}
TABLES["source lagkv"] = lambda: f"```python\n{(ROOT / 'nanokv/policies/lagkv.py').read_text(encoding='utf-8')}```"
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def refreshed(text: str) -> str:
    """A page with every block made anew. ValueError if a block has an unknown name."""

    def block(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table is called {match[2]!r}; there are {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]]() + "\n" + match[3]

    return BLOCK.sub(block, text)


def main() -> int:
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = refreshed(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
