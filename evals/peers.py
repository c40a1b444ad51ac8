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
from dataclasses import dataclass
from typing import Any

import torch

from evals.dense import begin
from evals.quality import PROTOCOLS, Item, mean, script, solved, text_of
from evals.speed import ROUNDS, STEPS, in_turn, timed
from nanokv import parse
from nanokv.llm import LLM
from weights.fetch import locate

INSTALL = "pip install -r requirements-peers.txt"


@dataclass(frozen=True)
class Pair:
    """One method in both programs, with the same settings. kept: the share that stays, 0 … 1."""

    name: str
    ours: str  # a plan; one that nanokv does not know yet is a row without our figures
    press: str  # of kvpress, by class
    settings: dict[str, Any]
    inner: tuple[str, dict[str, Any]] | None = None  # a press inside the press

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
# kvpress pools by average, counts the recent tokens of a lazy layer without the last one, and lets it grow
PAIRS = (
    Pair("snapkv", "snapkv:budget={},window=8,kernel=13,pool=avg", "SnapKVPress", SNAP),
    Pair("snapkv, kvpress's defaults", "snapkv:budget={},window=64,kernel=5,pool=avg", "SnapKVPress", {}),
    Pair("streaming", "streaming:budget={}", "StreamingLLMPress", {}),
    Pair(
        "simlayer",
        "simlayer:threshold=0.9,window=1,recent=255,roll=false",
        "SimLayerKVPress",
        {"lazy_threshold": 0.9, "n_recent": 256},
    ),
    Pair("random", "random:budget={},window=1", "RandomPress", {"seed": 0}),
    Pair("tova", "tova:budget={}", "TOVAPress", {}),
    Pair("knorm", "knorm:budget={}", "KnormPress", {}),
    Pair("keydiff", "keydiff:budget={}", "KeyDiffPress", {}),
    Pair("expected", "expected:budget={}", "ExpectedAttentionPress", {}),
    Pair("adakv", "adakv:budget={},window=8,kernel=13,pool=avg", "AdaKVPress", {}, ("SnapKVPress", SNAP)),
    Pair("pyramidkv", "pyramidkv:budget={},window=8,kernel=13,pool=avg", "PyramidKVPress", SNAP),
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


def runners(llm: LLM, model: str, ids: list[int], kept: float) -> Iterator[Runner | tuple[str, str]]:
    """Every contender after its prefill, or (name, why it is not there)."""
    room, budget = ROUNDS * STEPS + 3, f"{kept:.0%}"
    known = [p for p in PAIRS if _plan(p, budget)]
    plans = {"full": "full"} | {p.name: _plan(p, budget) for p in known}
    llm.session(1).start([ids[:64]])
    for name, plan in plans.items():
        session, out = llm.session(room, plan=parse(plan)), []
        seconds = timed(lambda s=session, o=out: o.append(s.start([ids])), llm.device)
        yield Runner(f"nanokv {name}", seconds, _ours(session, out), lambda s=session: s.report().bytes)
    try:
        import transformers
    except ImportError:
        yield "transformers", f"not installed ({INSTALL})"
        return
    types = {
        t: getattr(torch, t) for t in dict.fromkeys([llm.dtypes["prefill"], "bfloat16", "float32"]) if t != "float16"
    }
    for name, dtype in types.items():
        yield _run(f"transformers DynamicCache {name}", Net(model, dtype, llm.device), ids)
    dtype = next(iter(types.values()))
    net = Net(model, dtype, llm.device)
    yield _guard("transformers StaticCache + compile", lambda: _compiled(net, ids, room))
    config = net.net.config
    for backend in ("quanto", "hqq"):
        make = lambda b=backend: transformers.QuantizedCache(backend=b, config=config, nbits=4)  # noqa: E731
        name = f"transformers QuantizedCache {backend} 4 bit"
        yield _guard(name, lambda n=name, m=make: _run(n, Net(model, dtype, llm.device), ids, m()))
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


def _plan(pair: Pair, budget: str) -> str | None:
    """Our plan of a pair, if nanokv has that method by now."""
    plan = pair.ours.format(budget)
    try:
        parse(plan)
    except ValueError:
        return None
    return plan


def _ours(session, out: list[torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        out[0] = session.feed(out[0].argmax(-1)[:, None])

    return step


def _run(name: str, net: Net, ids: list[int], cache: Any = None, press: Any = None) -> Runner:
    seconds = timed(lambda: net.start(ids, cache, press), net.device)
    return Runner(name, seconds, net.step, net.bytes)


def _compiled(net: Net, ids: list[int], room: int) -> Runner:
    from transformers import StaticCache

    cache = StaticCache(config=net.net.config, max_cache_len=len(ids) + room)
    runner = _run("transformers StaticCache + compile", net, ids, cache)
    net.call = torch.compile(net.net.forward)
    runner.compile_s = timed(lambda: (net.step(), net.step()), net.device)
    return runner


def _guard(name: str, make: Callable[[], Runner]) -> Runner | tuple[str, str]:
    """Another program's failure is a row of the table, not the end of the run."""
    try:
        return make()
    except ImportError as e:
        return name, f"not installed ({str(e).splitlines()[0][:60]}; {INSTALL})"
    except Exception as e:  # whatever a peer raises
        return name, f"failed: {type(e).__name__}: {(str(e) or ' ').splitlines()[0][:90]}"


def speed(llm: LLM, model: str, length: int, kept: float) -> list[dict]:
    """Prefill and decode at one length; decode steps take turns."""
    ids, rows, ready = text_of(llm, 0, length), [], []
    for made in runners(llm, model, ids, kept):
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


def llama_bench(length: int, program: str, gguf: str | None, threads: int) -> dict:
    """llama.cpp's own benchmark on a .gguf file of the same model: prefill of `length`, and decode at that depth."""
    row, found = {"name": "llama.cpp", "length": length}, shutil.which(program)
    if found is None:
        return row | {"absent": "llama-bench is not installed; build llama.cpp and give --llama-bench PATH"}
    if gguf is None:
        return row | {"absent": "llama-bench is here, but no model for it; give --gguf FILE"}
    command = [found, "-m", gguf, "-p", str(length), "-n", "0", "-r", "2", "-t", str(threads), "-o", "json"]
    decode = [*command[:3], "-p", "0", "-n", "24", "-d", str(length), "-r", "2", "-t", str(threads), "-o", "json"]
    try:
        made = [
            json.loads(subprocess.run(c, capture_output=True, text=True, check=True).stdout)[0]
            for c in (command, decode)
        ]
    except (subprocess.CalledProcessError, ValueError, IndexError) as e:
        return row | {"absent": f"llama-bench failed: {str(e).splitlines()[0][:90]}"}
    row["name"] += f" {made[0]['model_type']}, its own process"
    return row | {"prefill_s": length / made[0]["avg_ts"], "compile_s": 0.0, "decode_tok_s": made[1]["avg_ts"]}


# ---- quality -------------------------------------------------------------------------------------------------------


def quality(
    llm: LLM, model: str, tasks: Sequence[str], length: int, seeds: int, kept: float, tick: Callable[[], Any]
) -> list[dict]:
    """Both programs' scores on the same texts, and the bytes that their caches hold after the prompt."""
    try:
        import kvpress  # noqa: F401
    except ImportError:
        return [{"name": "kvpress", "absent": f"not installed ({INSTALL})"}]
    net = Net(model, getattr(torch, llm.dtypes["prefill"]), llm.device)
    budget = f"{kept:.0%}"
    plans = {p.name: parse(_plan(p, budget)) for p in PAIRS if _plan(p, budget)}
    found: dict[tuple, list[tuple[float, int]]] = {}
    for task in tasks:
        for seed in range(seeds):
            made = Item(task, length, seed).make(llm.tokenizer)
            for protocol in PROTOCOLS:
                ids, turns = script(made, llm.tokenizer, protocol)
                turn = turns[0]
                names = ["full", *plans]
                for i, start in begin(llm, [parse("full"), *plans.values()], ids, len(turn.ids)):
                    session, before = start()
                    size = session.report().live_bytes
                    after = session.feed(torch.tensor([turn.ids], device=llm.device), every=True)[0]
                    found.setdefault((task, names[i], "ours", protocol), []).append((solved(before, after, turn), size))
                for pair in [None, *PAIRS]:
                    name = pair.name if pair else "full"
                    net.start(ids, press=pair.build(kept) if pair else None)
                    size, before = net.bytes(), net.logits
                    score = solved(before, net.feed(turn.ids), turn)
                    found.setdefault((task, name, "theirs", protocol), []).append((score, size))
                tick()
    rows = []
    for task, name in dict.fromkeys(k[:2] for k in found):
        row = {"task": task, "name": name, "length": length, "kept": kept, "texts": seeds}
        for who in ("ours", "theirs"):
            for protocol in PROTOCOLS:
                if mine := found.get((task, name, who, protocol)):
                    row[f"{who}_{protocol}"] = mean([score for score, _ in mine])
                    row[f"{who}_bytes"] = mean([size for _, size in mine])
        rows.append(row)
    return rows
