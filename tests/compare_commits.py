"""Whether a refactoring moved nothing but names: two commits run the same plans, and their logits and receipts are compared.

`python tests/compare_commits.py --old 2fded0c` takes the old commit out of git and runs it beside the repository this file stands
in, as it is on disk; `--new` names another folder or commit. One child process per side, one thread each, runs every plan: a prompt,
single steps, a turn, then the saved prompt loaded again. Exit status 1 if logits differ by more than 1e-6, if any number of a receipt
differs, or if one side refuses what the other does. Not collected by pytest: it needs two commits and some minutes.

Three models: a tiny one with a sliding window, made here; the first layers of smollm2-135m, which are quick; and for a few plans
all of it. All compute in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# ---- all that is asked of nanokv, under its old names and its new ones ----------------------------------------------


def load_model(name: str) -> Any:
    import nanokv

    if Path.cwd() not in Path(nanokv.__file__).resolve().parents:
        raise RuntimeError(f"nanokv came from {nanokv.__file__}, not from {Path.cwd()}")
    return nanokv.load(name, device="cpu", dtype="float32")


def encode(llm: Any, text: str) -> list[int]:
    return llm.tokenizer.encode(text)


def parse_plan(llm: Any, text: str, share: dict[int, int] | None) -> Any:
    """The plan; who shares is looked up in `share`, or searched for if that is None."""
    import nanokv

    plan = nanokv.parse(text)
    if plan.sharer is not None and share is not None:
        return replace(plan, share=share, ready=True)
    return llm.ready(plan)


def make_session(llm: Any, plan: Any, room: int) -> Any:
    if hasattr(llm, "session"):
        return llm.session(room, plan=plan)
    from nanokv.engine import Session

    return Session(llm.models, plan, room)


def start(session: Any, prompts: list[list[int]]) -> Any:
    """The logits after each row's prompt (B,vocab)."""
    return session.start(prompts)


def step(session: Any, tokens: Any) -> Any:
    """The logits after each of the tokens (B,T) → (B,T,vocab)."""
    import inspect

    every = "every_logit" if "every_logit" in inspect.signature(session.feed).parameters else "each"
    return session.feed(tokens, **{every: True})


def reserve(session: Any, room: int) -> None:
    session.reserve(room)


def report_as_dict(session: Any) -> dict[str, Any] | None:
    """Every number of the receipt, under one set of names; None while a policy still waits."""
    report = session.report()
    if report is None:
        return None
    found = {name: getattr(report, name) for name in ("bytes", "host_bytes", "full_bytes", "ratio", "seen")}
    found["used_bytes"] = report.used_bytes if hasattr(report, "used_bytes") else report.live_bytes
    names = "layer", "owner", "bytes", "kept", "k_bits", "v_bits"
    return found | {"layers": [{name: getattr(x, name) for name in names} for x in report.layers]}


def save_prompt(llm: Any, session: Any, file: Path) -> None:
    try:
        from nanokv.save import save
    except ImportError:  # before it moved
        from nanokv.cache.save import save
    save(llm, session, file)


def load_prompt(llm: Any, file: Path, room: int) -> Any:
    try:
        from nanokv.save import restore
    except ImportError:  # before it moved
        from nanokv.cache.save import restore
    return restore(llm, file, room)


# ---- what is run ---------------------------------------------------------------------------------------------------

# name: the numbers that suit it. The tiny model sees 23 tokens back; two rows of it go together
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "prompts": (300, 260), "share": None, "sharer": "kvsharer:layers=1,threshold=-1",
        "b": 12, "percent": "4%", "size": "160KiB", "w": 4, "s": 2, "r": 8, "g": 8, "e": 8, "c": 4, "x": 8, "n": 12,
    },
    "smollm2-cut": {
        "prompts": (200,), "share": {1: 0, 3: 2, 4: 2, 5: 0}, "sharer": "kvsharer:layers=4",
        "b": 64, "percent": "30%", "size": "1200KiB", "w": 16, "s": 4, "r": 40, "g": 32, "e": 16, "c": 8, "x": 32, "n": 64,
    },
}  # fmt: skip
MODELS["smollm2-135m"] = MODELS["smollm2-cut"] | {"size": "6MiB", "share": {5: 2, 12: 11, 20: 2, 27: 21}}
CUT = 6  # layers
STEPS, TURN, AFTER = 40, 7, 5  # single tokens, tokens of the turn, single tokens after loading

# b: budget, w: window, s: sinks, r: recent tokens, g: group, e: every so many, c: chunk, x: what a step reads, n: values fetched
SNAP, STREAM, H2O = "snapkv:budget={b},window={w}", "streaming:sink={s},recent={r}", "h2o:budget={b}"
SIM = "simlayer:threshold=0.3,sink={s},recent={r},window={w}"
SHADOW, QUEST = "shadow:chunk={c},budget={x},local=1,outliers=2", "quest:chunk={c},budget={x}"
INT = "int:group={g},residual={g}"
PLANS = [
    # each policy in its own store
    "full",
    "random:budget={b},window={w}",
    STREAM,
    STREAM + ",positions=cache",
    SNAP,
    "snapkv:budget={percent},window={w},group=max,pool=avg,kernel=5",
    "snapkv:budget={size},window={w}",
    "adakv:budget={b},window={w}",
    "chunkkv:budget={b},window={w},chunk={c}",
    SIM,
    "simlayer:variant=decode,threshold=0.3,sink={s},recent={r}",
    "simlayer:variant=light,sink={s},recent={r},window={w},full=1",
    H2O,
    "tova:budget={b}",
    "keyformer:budget={b}",
    "scissorhands:budget={b},every={e},window={w},recent=3",
    "corm:window={w},recent={w},every={e}",
    "cascade:budget={b},sink={s},rings=2",
    "duo:full=0.5,sink={s},recent={r},window={w}",
    "knorm:budget={b}",
    "keydiff:budget={b}",
    "expected:budget={b},sink={s},future=32",
    "mikv:budget={b}",
    "zipcache:every={e}",
    # what policies that rank tokens have in common
    SNAP + ",every={e}",
    SNAP + ",every={e},heads=ada,layers=pyramid",
    SNAP + ",heads=ada+" + INT,
    SNAP + ",select=chunk,chunk={c},heads=ada",
    SNAP + ",demote=true",
    "random:budget={b},window={w},layers=pyramid,heads=ada,select=chunk,chunk={c}",
    "knorm:budget={b},every={e},layers=pyramid",
    "keydiff:budget={b},heads=ada,every={e}",
    "h2o:budget={b},heads=ada,layers=pyramid",
    "zipcache:every={e},salient=0.4+mixed:high=4,low=3",
    # each store
    "full+ragged",
    "full+" + INT,
    "full+" + INT + ",k=8,v=2,pin={s}",
    "full+kivi2",
    "full+fp8:format=e5m2,pin={s}",
    "full+rot4",
    "full+turbo:k=3,v=2,pin={s}",
    SNAP + "+" + INT + ",k=2,v=8,pin={s}",
    SNAP + "+turbo:k=2,v=3",
    SNAP + ",every={e}+fp8",
    SIM + "+kivi4",
    STREAM + "+" + INT,
    H2O + "+rot4",
    "scissorhands:budget={b},every={e},window={w},recent=3+turbo",
    "cascade:budget={b},sink={s},rings=2+rot4",
    # chunks of which a step reads a few
    "full+" + SHADOW,
    "full+" + SHADOW + ",values=int4,reuse=false",
    "full+" + SHADOW + ",grow={g}",
    SIM + "+" + SHADOW + ",rank=8,values=device",
    "full+" + QUEST,
    "full+" + QUEST + ",grow={g},reuse=false",
    # shared layers
    "full+{sharer}",
    SNAP + "+" + INT + "+{sharer}",
    H2O + "+{sharer}",
    STREAM + "+turbo+{sharer}",
    "full+" + SHADOW + "+{sharer}",
    # other places
    "full+offload",
    SNAP + ",every={e}+offload",
    H2O + "+{sharer}+offload",
    "full+kcache:n={n},sink={s},recent=4",
    SNAP + "+kcache:n=8,sink={s},recent=3,norm=false",
]
# too much like the others to be worth a slower model's time; the last five are refused
MORE = [
    "streaming:budget={b},sink={s}",
    "pyramidkv:budget={b},window={w}",
    SIM + ",roll=false",
    SNAP + ",heads=ada+dense",
    "expected:budget={b},layers=pyramid,sink={s},future=32",
    "tova:budget={b},select=chunk,chunk={c}",
    "full+int4",
    "full+fp8",
    "full+turbo",
    SNAP + "+int8:group={g},residual=0",
    SNAP + "+rot4:pin={s}",
    SIM + "+turbo",
    STREAM + "+fp8",
    STREAM + "+ragged",
    H2O + "+fp8",
    H2O + "+turbo",
    SIM + "+" + QUEST,
    SNAP + ",every={e}+{sharer}",
    SNAP + ",demote=true,every={e}+mixed:high=8,low=4",
    H2O + "+int4",
    SNAP + "+" + SHADOW,
    "mikv:budget={b}+dense",
    "full+int4+offload",
]
WHOLE = ["full", H2O, SNAP + "+" + INT + "+{sharer}", "full+" + QUEST]  # with all layers of smollm2-135m


def cases(given: Sequence[str], models: Sequence[str]) -> list[tuple[str, str]]:
    """(model, plan) in the order in which both sides run them."""
    lists = {"tiny": PLANS + MORE, "smollm2-cut": PLANS, "smollm2-135m": WHOLE}
    chosen = [(name, p) for name in models for p in given or lists[name]]
    return [(name, plan.format(**MODELS[name])) for name, plan in chosen]


# ---- a child: one side ---------------------------------------------------------------------------------------------


def child(todo: Path, out: Path) -> None:
    """Run the cases of a JSON file on the nanokv of this folder; write 0.pt, 1.pt, … into `out`, each once it is whole."""
    sys.path.insert(0, str(Path.cwd()))
    import torch

    torch.set_num_threads(1)
    asked = json.loads(todo.read_text())
    name, llm = "", None
    for i, (model, plan) in enumerate(asked["cases"]):
        if model != name:
            name, llm = model, None  # the last one goes before the next one comes
            llm = load_model(asked["paths"].get(model, model))
        with torch.inference_mode():
            found = run(llm, model, plan, out / "saved")
        torch.save(found, out / "part")
        os.replace(out / "part", out / f"{i}.pt")


def run(llm: Any, model: str, text: str, file: Path) -> dict[str, Any]:
    """All that one plan says: logits and receipts by stage, and at which stage it was refused or broke, if it was."""
    import torch

    prompts, tokens = texts(llm, model)
    rows = torch.tensor(tokens).expand(len(prompts), -1)
    found: dict[str, Any] = {"logits": {}, "receipts": {}, "refused": {}, "broken": ""}
    stage, session = "plan", None

    def note(logits: Any) -> None:
        found["logits"][stage] = logits.clone()
        found["receipts"][stage] = report_as_dict(session)

    try:
        session = make_session(llm, parse_plan(llm, text, MODELS[model]["share"]), STEPS)
        stage = "prompt"
        note(start(session, prompts))
        saved = keep(llm, session, file, found)
        stage = "steps"
        note(torch.cat([step(session, rows[:, t : t + 1]) for t in range(STEPS)], 1))
        if not saved:  # a policy that waits has decided by now
            saved = keep(llm, session, file, found)
        stage = "turn"
        reserve(session, TURN)
        note(step(session, rows[:, STEPS : STEPS + TURN]))
        if saved:
            stage = "loaded"
            session = load_prompt(llm, file, AFTER)
            note(torch.cat([step(session, rows[:1, -t : len(tokens) - t + 1]) for t in range(AFTER, 0, -1)], 1))
    except ValueError as e:
        found["refused"][stage] = str(e)
    except Exception:
        found["broken"] = f"{stage}: {traceback.format_exc()}"
    return found


def keep(llm: Any, session: Any, file: Path, found: dict[str, Any]) -> bool:
    """Save what was kept of row 0; False, and a line in `refused`, if the plan does not allow it now."""
    try:
        save_prompt(llm, session, file)
    except ValueError as e:
        found["refused"]["save"] = str(e)
        return False
    found["refused"].pop("save", None)
    return True


def texts(llm: Any, model: str) -> tuple[list[list[int]], list[int]]:
    """The prompts, and the tokens that follow each of them: random for the tiny model, Python's own documentation for the others."""
    from pydoc_data.topics import topics

    import torch

    lengths, more = MODELS[model]["prompts"], STEPS + TURN + AFTER
    if model == "tiny":
        dice = torch.Generator().manual_seed(5)
        drawn = [torch.randint(0, 96, (n,), generator=dice).tolist() for n in (*lengths, more)]
        return drawn[:-1], drawn[-1]
    ids = encode(llm, topics["compound"][:4000])
    return [ids[:n] for n in lengths], ids[max(lengths) :][:more]


# ---- the parent ----------------------------------------------------------------------------------------------------


def checkout(what: str, into: Path) -> Path:
    """A folder as it is, or a commit of this repository taken out of git."""
    if Path(what).is_dir():
        return Path(what).resolve()
    into.mkdir()
    root = Path(__file__).resolve().parent.parent
    tar = subprocess.run(["git", "-C", root, "archive", what], stdout=subprocess.PIPE)
    if tar.returncode:
        sys.exit(f"compare_commits: {what} is neither a folder nor a commit of {root}")
    subprocess.run(["tar", "-x", "-C", into], input=tar.stdout, check=True)
    return into.resolve()


def write_tiny(path: Path) -> None:
    """A Mistral of three layers with random weights, large enough that attention is far from uniform."""
    from tiny import write_seeded

    write_seeded(path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=24)


def write_cut(source: Path, path: Path) -> None:
    """The first layers of a checkpoint."""
    from safetensors.torch import load_file, save_file

    path.mkdir()
    weights = {}
    for file in source.glob("*.safetensors"):
        weights |= load_file(file)
    names = [n for n in weights if not n.startswith("model.layers.") or int(n.split(".")[2]) < CUT]
    save_file({n: weights[n] for n in names}, path / "model.safetensors")
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, path)
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": CUT}))


def launch(side: Path, todo: Path, out: Path, model: Path) -> subprocess.Popen:
    """A child over one checkout. It finds the fetched model, and keeps the maps of its own searches, in a folder of its own."""
    weights = out / "weights"
    weights.mkdir(parents=True)
    (weights / model.name).symlink_to(model)
    own = {"NANOKV_WEIGHTS": str(weights), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": ""}
    own["PYTHONDONTWRITEBYTECODE"] = "1"  # a checkout on disk stays as it is
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(todo), str(out)]
    return subprocess.Popen(command, cwd=side, env={**os.environ, **own})


def wait(file: Path, process: subprocess.Popen, what: str) -> dict[str, Any]:
    """What a child wrote, as soon as it is there."""
    import torch

    while not file.is_file():
        if process.poll() is not None and not file.is_file():
            sys.exit(
                f"compare_commits: the {what} side ended with status {process.returncode}; see its traceback above"
            )
        time.sleep(0.05)
    found = torch.load(file, weights_only=True)
    file.unlink()
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Where two runs of one plan differ: {difference: of the logits, wrong: sentences, refused: the old side's reasons}."""
    wrong = [f"{side} broke at {x['broken']}" for side, x in (("old", old), ("new", new)) if x["broken"]]
    if old["refused"].keys() != new["refused"].keys():
        wrong.append(f"refused: old {old['refused'] or 'nothing'}, new {new['refused'] or 'nothing'}")
    if old["logits"].keys() != new["logits"].keys():
        wrong.append(f"stages: old {list(old['logits'])}, new {list(new['logits'])}")
    most = 0.0
    for stage in [x for x in old["logits"] if x in new["logits"]]:
        a, b = old["logits"][stage], new["logits"][stage]
        if a.shape != b.shape:
            wrong.append(f"logits of {stage}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
        elif not a.equal(b):
            apart = (a - b).abs().max().item()
            most = max(most, apart)
            if not apart <= 1e-6:  # also if it is no number
                wrong.append(f"logits of {stage} differ by up to {apart:.3g}")
        if said := first_difference(old["receipts"][stage], new["receipts"][stage]):
            wrong.append(f"receipt of {stage}{said}")
    return {"difference": most, "wrong": wrong, "refused": old["refused"]}


def first_difference(a: Any, b: Any) -> str:
    """': path: a, b' of the first place where two nested values differ, or nothing."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((f".{k}{said}" for k in a if (said := first_difference(a[k], b[k]))), "")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next((f"[{i}]{said}" for i, x in enumerate(a) if (said := first_difference(x, b[i]))), "")
    return "" if type(a) is type(b) and a == b else f": {a}, {b}"


def verdict(case: dict[str, Any], found: dict[str, Any]) -> str:
    if case["wrong"]:
        return "DIFFERS"
    if not found["logits"]:
        return "refused"
    return "equal" if case["difference"] == 0 else f"{case['difference']:.1e}"


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="compare_commits", description=__doc__.split("\n\n")[0])
    p.add_argument("--old", default="2fded0c", metavar="FOLDER|COMMIT")
    p.add_argument("--new", default=str(Path(__file__).resolve().parent.parent), metavar="FOLDER|COMMIT")
    p.add_argument(
        "--plans", nargs="+", default=[], metavar="PLAN", help="instead of all; {b} and the like are filled in"
    )
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        child(*args.child)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children end and the folder goes
    t0, todo = time.monotonic(), cases(args.plans, args.models)
    results, children = [], {}
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        tmp = Path(folder)
        sides = {name: checkout(getattr(args, name), tmp / f"{name}-commit") for name in ("old", "new")}
        sys.path.insert(0, str(sides["old"]))
        from weights.fetch import locate  # fetches it once, into weights/ of that side unless NANOKV_WEIGHTS says where

        whole = locate("smollm2-135m").resolve()
        write_tiny(tmp / "tiny")
        write_cut(whole, tmp / "cut")
        paths = {"tiny": str(tmp / "tiny"), "smollm2-cut": str(tmp / "cut")}
        (tmp / "todo.json").write_text(json.dumps({"cases": todo, "paths": paths}))
        try:
            for name, side in sides.items():
                children[name] = launch(side, tmp / "todo.json", tmp / name, whole)
            for i, (model, plan) in enumerate(todo):
                found = {name: wait(tmp / name / f"{i}.pt", children[name], name) for name in sides}
                case = {"model": model, "plan": plan, **compare(found["old"], found["new"])}
                results.append(case | {"verdict": verdict(case, found["old"])})
                print(f"{results[-1]['verdict']:8} {model:12} {plan}", flush=True)
                for line in case["wrong"]:
                    print(f"         {line}")
        finally:
            for process in children.values():
                process.kill()
                process.wait()
    return conclude(results, args, time.monotonic() - t0)


def conclude(results: list[dict[str, Any]], args: argparse.Namespace, seconds: float) -> int:
    """The summary, the JSON file and the exit status."""
    counts: dict[str, dict[str, int]] = {}
    for case in results:
        kind = case["verdict"] if case["verdict"] in ("equal", "refused", "DIFFERS") else "within 1e-6"
        row = counts.setdefault(case["model"], {})
        row[kind] = row.get(kind, 0) + 1
    for model, row in counts.items():
        said = ", ".join(f"{n} {kind}" for kind, n in row.items())
        unsaved = sum("save" in c["refused"] for c in results if c["model"] == model)
        print(f"{model}: {sum(row.values())} plans, {said}; {unsaved} could not be saved")
    most, bad = max(c["difference"] for c in results), sum(bool(c["wrong"]) for c in results)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (used.ru_utime + used.ru_stime) / 2  # of one side: what a quiet machine with two cores would take
    print(
        f"{len(results)} runs a side, {bad} differ, logits by at most {most:.3g}; {seconds:.0f} s, {busy:.0f} s of them computing"
    )
    if args.json:
        facts = {"old": args.old, "new": args.new, "seconds": round(seconds), "summary": counts, "cases": results}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
