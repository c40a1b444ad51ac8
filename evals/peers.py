"""The same weights, prompts, budgets and machine for nanokv, transformers, kvpress and llama.cpp, in one run.

What is not installed is a row that says so (`pip install -r requirements-peers.txt`). The only module beside the tests that
imports transformers and kvpress. llama.cpp is a program of its own and cannot take turns with the others.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from evals.dense import begin
from evals.quality import PROTOCOLS, Item, mean, script, solved, text_of
from evals.speed import ROUNDS, STEPS, in_turn, stepper, timed
from nanokv import parse
from nanokv.cache.plan import Plan
from nanokv.engine import Session
from nanokv.llm import LLM
from nanokv.policies import POLICIES
from nanokv.runner import Compiled, Eager
from weights.fetch import locate

INSTALL = "pip install -r requirements-peers.txt"


@dataclass(frozen=True)
class Pair:
    """One method in both programs, as alike as their settings allow. kept: the share that stays, 0 … 1."""

    name: str
    ours: str  # a plan; of a method that nanokv does not know yet there is their figure alone
    press: str  # of kvpress, by class
    settings: dict[str, Any]
    inner: tuple[str, dict[str, Any]] | None = None  # a press inside the press
    differs: str = ""  # what no setting makes alike

    def build(self, kept: float) -> Any:
        import kvpress

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
        differs="kvpress judges a layer without the last query's attention to itself, so fewer layers are lazy",
    ),
    Pair("tova", "tova:budget={}", "TOVAPress", {}),
    Pair("knorm", "knorm:budget={}", "KnormPress", {}),
    Pair("keydiff", "keydiff:budget={}", "KeyDiffPress", {}),
    Pair("expected", "expected:budget={}", "ExpectedAttentionPress", {}),
    Pair("adakv", "adakv:budget={},window=8,kernel=13,pool=avg", "AdaKVPress", {}, ("SnapKVPress", SNAP)),
    Pair(
        "pyramidkv",
        "pyramidkv:budget={},window=8,kernel=13,pool=avg",
        "PyramidKVPress",
        SNAP,
        differs="kvpress draws the line without adding the window",
    ),
)


class Net:
    """transformers' model on the weights of a name, stepped by hand so that keys keep their own positions."""

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
        self.logits = self._forward(self.call, self.logits.argmax(-1).tolist())

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after every token (T,vocab). Token by token where layers differ in length: their shared mask fits only one."""
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
        """Storages that the cache holds, each once; codes and scales of quantised layers included."""
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
    name: str
    prefill_s: float
    step: Callable[[], object]
    bytes: Callable[[], int]
    compile_s: float = 0.0


def runners(llm: LLM, model: str, ids: list[int], budget: str) -> Iterator[Runner | tuple[str, str]]:
    """Every contender after its prefill, or (name, why it is not there). Ours step as plain calls and with compiled blocks."""
    room, kept = ROUNDS * STEPS + 5, share(budget)
    plans = {"full": parse("full")} | {p.name: plan for p in PAIRS if (plan := _plan(p, budget))}
    llm.session(room).start([ids])  # everybody's first prompt of a shape is slow; theirs see it twice too
    for how in (Eager(llm.models.decode), Compiled(llm.models.decode)):
        models = replace(llm.models, runner=how)
        for name, plan in plans.items():
            session, out = Session(models, llm.ready(plan), room), []
            seconds = timed(lambda s=session, o=out: o.append(s.start([ids])), llm.device)
            step = stepper(session, out[0])
            before = how.compile_s
            step(), step()
            name = f"nanokv {name}" + (", compiled" if how.compile_s else "")
            yield Runner(name, seconds, step, lambda s=session: s.report().bytes, how.compile_s - before)
    try:
        import transformers
    except ImportError:
        yield "transformers", f"not installed ({INSTALL})"
        return
    # every runner has weights of its own: a press leaves marks on the modules that a neighbour's step would meet
    types = dict.fromkeys([llm.dtypes["prefill"], "bfloat16", "float32"])
    for t in types:
        name = f"transformers DynamicCache {t}"
        yield _guard(name, lambda n=name, t=t: _run(n, Net(model, getattr(torch, t), llm.device), ids))
    dtype = getattr(torch, next(iter(types)))
    name = "transformers StaticCache + compile"
    yield _guard(name, lambda n=name: _compiled(n, Net(model, dtype, llm.device), ids, room))

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
    """Our plan of a pair, if nanokv has that method by now."""
    return parse(pair.ours.format(budget)) if pair.ours.partition(":")[0] in POLICIES else None


def share(budget: str) -> float:
    """Of a budget in percent: 25% → 0.25."""
    return float(budget[:-1]) / 100


def _run(name: str, net: Net, ids: list[int], cache: Callable[[], Any] | None = None, press: Any = None) -> Runner:
    """After a first prompt that does not count, the timed one, and a step that proves that there can be steps."""
    net.start(ids, cache and cache(), press)
    seconds = timed(lambda: net.start(ids, cache and cache(), press), net.device)
    net.step()
    return Runner(name, seconds, net.step, net.bytes)


def _compiled(name: str, net: Net, ids: list[int], room: int) -> Runner:
    from transformers import StaticCache

    runner = _run(name, net, ids, lambda: StaticCache(config=net.net.config, max_cache_len=len(ids) + room))
    net.call = torch.compile(net.net.forward)
    runner.compile_s = timed(lambda: (net.step(), net.step()), net.device)
    return runner


def _guard(name: str, make: Callable[[], Runner]) -> Runner | tuple[str, str]:
    """Another program's failure is a row of the table, not the end of the run."""
    try:
        return make()
    except ImportError as e:
        return name, f"not installed ({_line(e)}; {INSTALL})"
    except Exception as e:  # whatever a peer raises
        return name, f"failed: {type(e).__name__}: {_line(e)}"


def _line(e: Exception) -> str:
    return (str(e) or " ").splitlines()[0][:90]


def speed(llm: LLM, model: str, length: int, budget: str) -> list[dict]:
    """Prefill and decode at one length; decode steps take turns."""
    ids, rows, ready = text_of(llm, 0, length), [], []
    for made in runners(llm, model, ids, budget):
        if isinstance(made, tuple):
            rows.append({"name": made[0], "length": length, "absent": made[1]})
        else:
            ready.append(made)
            rows.append({"name": made.name, "length": length, "prefill_s": made.prefill_s, "compile_s": made.compile_s})
    times = in_turn([r.step for r in ready], llm.device)
    for r, seconds in zip(ready, times, strict=True):
        row = next(x for x in rows if x["name"] == r.name)
        row |= {"decode_tok_s": 1 / seconds, "ratio": times[0] / seconds, "bytes": r.bytes()}
    return rows


def llama_bench(length: int, program: str, gguf: str | None) -> dict:
    """llama.cpp's own benchmark on a .gguf file of the same model: prefill of `length`, and decode at that depth."""
    row, found = {"name": "llama.cpp", "length": length}, shutil.which(program)
    if found is None:
        return row | {"absent": "llama-bench is not installed; build llama.cpp and give --llama-bench PATH"}
    if gguf is None:
        return row | {"absent": "llama-bench is here, but no model for it; give --gguf FILE"}
    common = [found, "-m", gguf, "-r", "2", "-t", str(torch.get_num_threads()), "-o", "json"]
    works = (["-p", str(length), "-n", "0"], ["-p", "0", "-n", "24", "-d", str(length)])
    try:
        done = [subprocess.run([*common, *w], capture_output=True, text=True, check=True) for w in works]
        prefill, decode = (json.loads(d.stdout)[0] for d in done)
        row["name"] += f" {prefill['model_type']}, a process of its own"
        return row | {"prefill_s": length / prefill["avg_ts"], "compile_s": 0.0, "decode_tok_s": decode["avg_ts"]}
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError, KeyError) as e:
        return row | {"absent": f"llama-bench failed: {_line(e)}"}


# ---- quality -------------------------------------------------------------------------------------------------------


def quality(
    llm: LLM, model: str, tasks: Sequence[str], length: int, seeds: int, budget: str, tick: Callable[[], Any]
) -> list[dict]:
    """Both programs' scores on the same texts, and the bytes that their caches hold after the turn."""
    try:
        import kvpress  # noqa: F401
    except ImportError:
        return [{"name": "kvpress", "absent": f"not installed ({INSTALL})"}]
    net = Net(model, getattr(torch, llm.dtypes["prefill"]), llm.device)
    plans = {"full": parse("full")} | {p.name: plan for p in PAIRS if (plan := _plan(p, budget))}
    presses = {"full": None} | {p.name: p for p in PAIRS}
    found: dict[tuple, list[tuple[float, int]]] = {}
    failed: dict[str, str] = {}
    for task in tasks:
        for seed in range(seeds):
            made = Item(task, length, seed).make(llm.tokenizer)
            for protocol in PROTOCOLS:
                ids, turns = script(made, llm.tokenizer, protocol)
                for i, start in begin(llm, list(plans.values()), ids, len(turns[0].ids)):
                    session, before = start()
                    after = session.feed(torch.tensor([turns[0].ids], device=llm.device), each=True)[0]
                    got = solved(before, after, turns[0]), session.report().bytes
                    found.setdefault((task, list(plans)[i], "ours", protocol), []).append(got)
                for name, pair in presses.items():
                    try:
                        net.start(ids, press=pair and pair.build(share(budget)))
                        before = net.logits
                        got = solved(before, net.feed(turns[0].ids), turns[0]), net.bytes()
                        found.setdefault((task, name, "theirs", protocol), []).append(got)
                    except Exception as e:  # whatever a peer raises; its row says so
                        failed[name] = f"kvpress failed: {type(e).__name__}: {_line(e)}"
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
                    if mine := found.get((task, name, who, protocol)):
                        row[f"{who}_{protocol}"] = mean([score for score, _ in mine])
                        row[f"{who}_bytes"] = mean([size for _, size in mine])
            row["differs"] = _differs(found, task, name, pair)
            rows.append(row)
    return rows


def _differs(found: dict, task: str, name: str, pair: Pair | None) -> str:
    """How far the two programs' scores are from each other on the same texts, with its standard error, and why."""
    said = []
    for protocol in PROTOCOLS:
        both = [found.get((task, name, who, protocol)) for who in ("ours", "theirs")]
        if None in both:
            return ""
        gaps = torch.tensor([a[0] - b[0] for a, b in zip(*both, strict=True)], dtype=torch.float64)
        if gaps.any():
            said.append(f"{protocol} {gaps.mean():+.0%} ± {gaps.std() / len(gaps) ** 0.5:.0%}")
    return "; ".join([*said, pair.differs] if said and pair and pair.differs else said)
