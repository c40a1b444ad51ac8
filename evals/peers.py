"""Compare nanokv with transformers, kvpress and llama.cpp in one run, on the same weights, prompts and machine.

A program that is not installed gets a row that says so (`pip install -r requirements-peers.txt`). Apart from tests and
`evals.gpu`, only this module imports transformers and kvpress. llama.cpp runs in its own process, so its steps cannot
alternate with the others' steps.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evals.quality import PROTOCOLS, Item, mean, prompt_and_turns, solved, text_of
from evals.speed import ROUNDS, STEPS, alternate, stepper, timed, weight_bytes
from nanokv import parse
from nanokv.cache.plan import Plan
from nanokv.compiled import Compiled
from nanokv.engine import Session
from nanokv.inspect.dense import begin
from nanokv.llm import LLM
from nanokv.policies import POLICIES
from nanokv.runner import Eager
from nanokv.text.sampler import likeliest
from weights.fetch import locate

INSTALL = "pip install -r requirements-peers.txt"


@dataclass(frozen=True)
class Pair:
    """One method in nanokv and in kvpress, with settings as equal as possible."""

    name: str
    ours: str  # a plan; a method that nanokv lacks has only kvpress's figures
    press: str  # name of kvpress's class
    settings: dict[str, Any]
    inner: tuple[str, dict[str, Any]] | None = None  # a press inside the press
    differs: str = ""  # what differs under all settings

    def build(self, kept: float) -> Any:
        """Build kvpress's press that keeps this share (0 … 1) of the tokens."""
        import kvpress

        logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip's press says at each text that it is slow
        if self.inner is not None:
            name, settings = self.inner
            return getattr(kvpress, self.press)(
                getattr(kvpress, name)(compression_ratio=1 - kept, **settings), **self.settings
            )
        ratio = {} if self.press == "SimLayerKVPress" else {"compression_ratio": 1 - kept}
        return getattr(kvpress, self.press)(**ratio, **self.settings)


SNAP = {"window_size": 8, "kernel_size": 13}
PAIRS = (
    Pair("snapkv", "snapkv:budget={},window=8,kernel=13,pool=avg", "SnapKVPress", SNAP),
    Pair("snapkv, kvpress's defaults", "snapkv:budget={},window=64,kernel=5,pool=avg", "SnapKVPress", {}),
    Pair("streaming", "streaming:budget={}", "StreamingLLMPress", {}),
    Pair(
        "simlayer",
        "simlayer:threshold=0.9,window=1,recent=255,roll=false",
        "SimLayerKVPress",
        {"lazy_threshold": 0.9, "n_recent": 256},
        differs="kvpress tests a layer without the last query's attention to itself, so fewer layers are lazy",
    ),
    Pair("tova", "tova:budget={}", "TOVAPress", {}),
    Pair("knorm", "knorm:budget={}", "KnormPress", {}),
    Pair("keydiff", "keydiff:budget={}", "KeyDiffPress", {}),
    Pair("expected", "expected:budget={}", "ExpectedAttentionPress", {}),
    Pair(
        "lagkv",
        "lagkv:budget={}",
        "LagKVPress",
        {},
        differs="tokens of equal rank in two partitions tie, and ties fall otherwise",
    ),
    Pair("adakv", "adakv:budget={},window=8,kernel=13,pool=avg", "AdaKVPress", {}, ("SnapKVPress", SNAP)),
    Pair(
        "pyramidkv",
        "pyramidkv:budget={},window=8,kernel=13,pool=avg",
        "PyramidKVPress",
        SNAP,
        differs="kvpress's budget per layer does not include the window",
    ),
)
# scored, but not timed
SCORED = (
    *PAIRS,
    Pair(
        "expected:heads=ada",
        "expected:budget={},epsilon=0.01,heads=ada",
        "AdaKVPress",
        {},
        ("ExpectedAttentionPress", {"epsilon": 0.01}),
    ),
    Pair("critical", "critical:budget={},window=8,kernel=13,pool=avg", "CriticalKVPress", {}, ("SnapKVPress", SNAP)),
    Pair(
        "critical:heads=ada",
        "critical:budget={},window=8,kernel=13,pool=avg,heads=ada",
        "CriticalAdaKVPress",
        {},
        ("SnapKVPress", SNAP),
    ),
    Pair(
        "compactor",
        "compactor:budget={}",
        "CompactorPress",
        {},
        differs="keys are projected at random, and kvpress lets the padding of a block that is not full attend",
    ),
    Pair(
        "kvzip",
        "kvzip:budget={}",
        "KVzipPress",
        {},
        differs="kvpress's request ends with a chat template's end of a turn, and as many first tokens as the template "
        "writes before a text go unscored",
    ),
)


class Net:
    """transformers' model with the same weights. Positions are passed to it, so evicted keys do not shift them."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.net = load(locate(model), dtype=dtype, attn_implementation="sdpa").eval().to(device)
        self.call = self.net
        self.device = device

    @torch.inference_mode()
    def start(self, ids: Sequence[int], cache: Any = None, press: Any = None) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache() if cache is None else cache
        self.pos = 0
        with press(self.net) if press else nullcontext():
            self.logits = self._forward(self.net, ids)[-1:]

    @torch.inference_mode()
    def step(self) -> None:
        self.logits = self._forward(self.call, likeliest(self.logits).tolist())

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after every token (T,vocab).

        If layers differ in length, tokens are fed one by one, because all layers share one mask.
        """
        if len({layer.keys.shape[2] for layer in self.cache.layers}) == 1:
            return self._forward(self.net, ids, every=True)
        return torch.cat([self._forward(self.net, [i]) for i in ids])

    def _forward(self, call: Callable, ids: Sequence[int], every: bool = False) -> torch.Tensor:
        pos = torch.arange(self.pos, self.pos + len(ids), device=self.device)
        self.pos += len(ids)
        tokens, keep = torch.tensor([list(ids)], device=self.device), 0 if every else 1
        given = {"past_key_values": self.cache, "position_ids": pos[None], "use_cache": True, "logits_to_keep": keep}
        if type(self.cache).__name__ == "StaticCache":
            given["cache_position"] = pos
        return call(tokens, **given).logits[0]

    def bytes(self) -> int:
        """Return the bytes of the cache's storages, each counted once, with codes and scales of quantised layers."""
        found: dict[int, int] = {}

        def walk(x: Any, depth: int = 0) -> None:
            if isinstance(x, torch.Tensor):
                if hasattr(x, "__tensor_flatten__"):
                    for name in x.__tensor_flatten__()[0]:
                        walk(getattr(x, name), depth)
                else:
                    found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            elif isinstance(x, list | tuple):
                for y in x:
                    walk(y, depth)
            elif isinstance(x, dict):
                walk(list(x.values()), depth)
            elif depth < 2 and hasattr(x, "__dict__"):
                walk(vars(x), depth + 1)

        walk(self.cache.layers)
        return sum(found.values())


# ---- speed ---------------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """One program and cache that is ready for decode steps."""

    name: str
    prefill_s: float
    step: Callable[[], object]
    bytes: Callable[[], int]
    weight_bytes: int  # of weights that a step reads
    compile_s: float = 0.0


def runners(
    llm: LLM, model: str, ids: list[int], budget: str, plans: dict[str, Plan] | None = None
) -> Iterator[Runner | tuple[str, str]]:
    """Yield every runner after its prefill, or (name, reason for its absence). nanokv runs eager and compiled.

    plans: nanokv's, instead of those that kvpress has too; then other programs run the full cache only.
    """
    room, kept, of_pairs = ROUNDS * STEPS + 5, share(budget), plans is None
    if of_pairs:
        plans = {"full": parse("full")} | {p.name: plan for p in PAIRS if (plan := _plan(p, budget))}
    llm.session(room).start([ids])  # the first prompt of a shape is slow; `_run` repeats it for the others too
    for runner in (Eager(llm.models.decode), Compiled(llm.models.decode)):
        models = replace(llm.models, runner=runner)
        for name, plan in plans.items():
            session, out = Session(models, llm.ready(plan), room), []
            seconds = timed(lambda s=session, o=out: o.append(s.start([ids])), llm.device)
            step = stepper(session, out[0])
            before = runner.compile_s
            step(), step()
            name = f"nanokv {name}" + (", compiled" if runner.compile_s else "")
            size, weights = (lambda s=session: s.report().bytes), weight_bytes(llm.models.decode)
            yield Runner(name, seconds, step, size, weights, runner.compile_s - before)
    try:
        import transformers
    except ImportError:
        yield "transformers", f"not installed ({INSTALL})"
        return
    # every runner has its own weights, because a press changes the modules
    types = dict.fromkeys([llm.dtypes["prefill"], "bfloat16", "float32"])
    for t in types:
        name = f"transformers DynamicCache {t}"
        yield _guard(name, lambda n=name, t=t: _run(n, Net(model, getattr(torch, t), llm.device), ids))
    dtype = getattr(torch, next(iter(types)))
    name = "transformers StaticCache + compile"
    yield _guard(name, lambda n=name: _compiled(n, Net(model, dtype, llm.device), ids, room))

    if not of_pairs:
        return

    def quantised(net: Net, backend: str) -> Callable[[], Any]:
        return lambda: transformers.QuantizedCache(backend=backend, config=net.net.config, nbits=4)

    for backend in ("quanto", "hqq"):
        name, net = f"transformers QuantizedCache {backend} 4 bit", Net(model, dtype, llm.device)
        yield _guard(name, lambda n=name, net=net, b=backend: _run(n, net, ids, quantised(net, b)))
    try:
        import kvpress  # noqa: F401
    except ImportError:
        yield "kvpress", f"not installed ({INSTALL})"
        return
    for pair in PAIRS:
        yield _guard(
            f"kvpress {pair.name}",
            lambda p=pair: _run(f"kvpress {p.name}", Net(model, dtype, llm.device), ids, press=p.build(kept)),
        )


def _plan(pair: Pair, budget: str) -> Plan | None:
    """Return nanokv's plan of a pair, or None if nanokv lacks the method."""
    return parse(pair.ours.format(budget)) if pair.ours.partition(":")[0] in POLICIES else None


def share(budget: str) -> float:
    """Convert a budget in percent to a share: 25% → 0.25."""
    return float(budget[:-1]) / 100


def _run(name: str, net: Net, ids: list[int], cache: Callable[[], Any] | None = None, press: Any = None) -> Runner:
    """Prefill once to warm up and once for the time, then take one step to check that decoding works."""
    net.start(ids, cache and cache(), press)
    seconds = timed(lambda: net.start(ids, cache and cache(), press), net.device)
    net.step()
    return Runner(name, seconds, net.step, net.bytes, weight_bytes(net.net))


def _compiled(name: str, net: Net, ids: list[int], room: int) -> Runner:
    """Build a runner with a static cache and a compiled forward pass."""
    from transformers import StaticCache

    runner = _run(name, net, ids, lambda: StaticCache(config=net.net.config, max_cache_len=len(ids) + room))
    net.call = torch.compile(net.net.forward)
    runner.compile_s = timed(lambda: (net.step(), net.step()), net.device)
    return runner


def _guard(name: str, make: Callable[[], Runner]) -> Runner | tuple[str, str]:
    """Answer the failure of another program into a row of the table, so that the run goes on."""
    try:
        return make()
    except ImportError as e:
        return name, f"not installed ({_first_line(e)}; {INSTALL})"
    except Exception as e:  # a peer can raise any exception
        return name, f"failed: {type(e).__name__}: {_first_line(e)}"


def _first_line(e: Exception) -> str:
    return (str(e) or " ").splitlines()[0][:90]


def speed(llm: LLM, model: str, length: int, budget: str, plans: dict[str, Plan] | None = None) -> list[dict]:
    """Time prefill and decode at one length. The runners' decode steps alternate.

    `read_s` is how many bytes of weights and cache a step reads per second.
    """
    ids, rows, ready = text_of(llm, 0, length), [], []
    for made in runners(llm, model, ids, budget, plans):
        if isinstance(made, tuple):
            rows.append({"name": made[0], "length": length, "absent": made[1]})
        else:
            ready.append(made)
            rows.append({"name": made.name, "length": length, "prefill_s": made.prefill_s, "compile_s": made.compile_s})
    times = alternate([r.step for r in ready], llm.device)
    for r, seconds in zip(ready, times, strict=True):
        row, size = next(x for x in rows if x["name"] == r.name), r.bytes()
        read_s = (r.weight_bytes + size) / seconds
        row |= {"decode_tok_s": 1 / seconds, "ratio": times[0] / seconds, "bytes": size, "read_s": read_s}
    return rows


def llama_bench(llm: LLM, length: int, program: str, gguf: Sequence[str] | None) -> dict:
    """Run llama.cpp's benchmark: prefill `length` tokens, and decode after them.

    gguf: files of the same model, such as F16 and BF16. Each is tried with and without flash attention, and the row has
    the fastest prefill and the fastest decode; `tried` has all.
    """
    row, found = {"name": "llama.cpp", "length": length}, shutil.which(program)
    if found is None:
        return row | {"absent": "llama-bench is not installed; build llama.cpp and give --llama-bench PATH"}
    if gguf is None:
        return row | {"absent": "llama-bench is installed, but has no model; give --gguf FILE"}
    models = [text for file in gguf for text in ("-m", file)]
    common = [found, *models, "-fa", "0,1", "-r", "2", "-t", str(torch.get_num_threads()), "-o", "json"]
    works = (["-p", str(length), "-n", "0"], ["-p", "0", "-n", "24", "-d", str(length)])
    try:
        done = [subprocess.run([*common, *w], capture_output=True, text=True, check=True) for w in works]
        found = [json.loads(d.stdout) for d in done]
        prefill, decode = (max(runs, key=lambda run: run["avg_ts"]) for runs in found)
        row["name"] += f" {decode['model_type']} -fa {int(decode['flash_attn'])}, in its own process"
        row["tried"] = [
            {
                "file": Path(run["model_filename"]).name,
                "fa": int(run["flash_attn"]),
                "what": what,
                "tok_s": run["avg_ts"],
            }
            for what, runs in zip(("prefill", "decode"), found, strict=True)
            for run in runs
        ]
        c = llm.config
        size = length * c.num_hidden_layers * c.num_key_value_heads * 2 * c.head_dim * 2  # its cache is fp16
        return row | {
            "prefill_s": length / prefill["avg_ts"],
            "compile_s": 0.0,
            "decode_tok_s": decode["avg_ts"],
            "bytes": size,
            "read_s": (decode["model_size"] + size) * decode["avg_ts"],
        }
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError, KeyError) as e:
        return row | {"absent": f"llama-bench failed: {_first_line(e)}"}


# ---- quality -------------------------------------------------------------------------------------------------------


def pairs_of(names: Sequence[str] | None) -> list[Pair]:
    """The pairs with these names; None: all."""
    by_name = {p.name: p for p in SCORED}
    if unknown := [n for n in names or () if n not in by_name]:
        raise ValueError(
            f"--plans {unknown[0]} is no method that kvpress is compared in; there are {', '.join(map(repr, by_name))}"
        )
    return [by_name[n] for n in (by_name if names is None else dict.fromkeys(names))]


def quality(
    llm: LLM,
    model: str,
    pairs: Sequence[Pair],
    tasks: Sequence[str],
    length: int,
    seeds: int,
    budget: str,
    tick: Callable[[], Any],
) -> list[dict]:
    """Score nanokv and kvpress on the same texts, and report the bytes of their caches after the turn."""
    try:
        import kvpress  # noqa: F401
    except ImportError:
        return [{"name": "kvpress", "absent": f"not installed ({INSTALL})"}]
    net = Net(model, getattr(torch, llm.dtypes["prefill"]), llm.device)
    plans = {"full": parse("full")} | {p.name: plan for p in pairs if (plan := _plan(p, budget))}
    presses = {"full": None} | {p.name: p for p in pairs}
    found: dict[tuple, list[tuple[float, int]]] = {}
    failed: dict[str, str] = {}
    for task in tasks:
        for seed in range(seeds):
            made = Item(task, length, seed).make(llm.tokenizer)
            for protocol in PROTOCOLS:
                ids, turns = prompt_and_turns(made, llm.tokenizer, protocol)
                for i, start in begin(llm, list(plans.values()), ids, len(turns[0].ids)):
                    session, before = start()
                    after = session.feed(torch.tensor([turns[0].ids], device=llm.device), every_logit=True)[0]
                    got = solved(before, after, turns[0]), session.report().bytes
                    found.setdefault((task, list(plans)[i], "ours", protocol), []).append(got)
                for name, pair in presses.items():
                    try:
                        net.start(ids, press=pair and pair.build(share(budget)))
                        before = net.logits
                        got = solved(before, net.feed(turns[0].ids), turns[0]), net.bytes()
                        found.setdefault((task, name, "theirs", protocol), []).append(got)
                    except Exception as e:  # a peer can raise any exception; its row reports it
                        failed[name] = f"kvpress failed: {type(e).__name__}: {_first_line(e)}"
                tick()
    rows = []
    for task in tasks:
        for name, pair in presses.items():
            row = {"task": task, "name": name, "length": length, "kept": budget, "texts": seeds}
            if name in failed:
                rows.append(row | {"absent": failed[name]})
                continue
            for who in ("ours", "theirs"):
                for protocol in PROTOCOLS:
                    if results := found.get((task, name, who, protocol)):
                        row[f"{who}_{protocol}"] = mean([score for score, _ in results])
                        row[f"{who}_bytes"] = mean([size for _, size in results])
            row["differs"] = _differs(found, task, name, pair)
            rows.append(row)
    return rows


def _differs(found: dict, task: str, name: str, pair: Pair | None) -> str:
    """Describe the mean difference of the two programs' scores with its standard error, and its cause if known."""
    parts = []
    for protocol in PROTOCOLS:
        both = [found.get((task, name, who, protocol)) for who in ("ours", "theirs")]
        if None in both:
            return ""
        gaps = torch.tensor([a[0] - b[0] for a, b in zip(*both, strict=True)], dtype=torch.float64)
        if gaps.any():
            parts.append(f"{protocol} {gaps.mean():+.0%} ± {gaps.std() / len(gaps) ** 0.5:.0%}")
    return "; ".join([*parts, pair.differs] if parts and pair and pair.differs else parts)
