"""Text from a model under a KV-cache policy: `python generate.py --model llama2-7b --policy simlayer -p "…"`.

The text goes to stdout, everything else to stderr. What the flags mean: --help; what each policy does: --list-policies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from weights.registry import DEFAULT, MODELS, Hub, settings


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.error = lambda message: sys.exit(complain(message))
    a = p.add_argument
    a(
        "--model",
        default=DEFAULT,
        metavar="M",
        help="directory, .gguf file, name (--list-models) or hub id (default %(default)s)",
    )
    a("--policy", default="full", metavar="PLAN", help="parts joined by +, as in snapkv:budget=512 (--list-policies)")
    a("--kv-budget", metavar="N", help="what is kept of the prompt: 512 | 25%% | 256MiB; fills the policy's budget")
    a("--k-bits", metavar="N", help="bits of keys in the plan's store (none named: int); these four fill its keys")
    a("--v-bits", metavar="N", help="bits of values")
    a("--kv-group-size", metavar="N", help="numbers that share a scale")
    a("--residual", metavar="N", help="the last tokens that stay exact")
    a("-p", "--prompt", metavar="TEXT", help="the prompt; - reads standard input")
    a("--prompt-file", metavar="FILE", help="the prompt from a UTF-8 file")
    a(
        "--question",
        metavar="TEXT",
        help="continues on the cache after the prompt was compressed without having seen it",
    )
    a("--chat", action="store_true", help="put the prompt into the model's chat template")
    a("--system", metavar="TEXT", help="system message (implies --chat)")
    a(
        "--interactive",
        action="store_true",
        help="a conversation on one compressed cache; /reset /stats /policy PLAN /exit",
    )
    a("-n", "--max-new-tokens", "--max-tokens", type=int, default=256, metavar="N", help="default %(default)s")
    a("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    a("--top-k", type=int, default=0, metavar="K")
    a("--top-p", type=float, default=1.0, metavar="P")
    a("--min-p", type=float, default=0.0, metavar="P")
    a("--seed", type=int, default=0, metavar="N")
    a("--num-samples", type=int, default=1, metavar="N", help="answers drawn from one prefill")
    a("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    a("--ignore-eos", action="store_true", help="do not end at the end-of-text token (for timing)")
    a("--allow-overflow", action="store_true", help="go on beyond the model's context")
    a(
        "--chunk",
        type=int,
        metavar="N",
        help="prefill in chunks of N tokens: exact, but the whole cache lives until the last one",
    )
    a("--device", default="auto", metavar="D", help="auto | cpu | cuda | mps")
    a(
        "--dtype",
        default="auto",
        metavar="T",
        help="auto | float32 | bfloat16 | float16, or prefill/decode as in bfloat16/float16",
    )
    a(
        "--backend",
        default="auto",
        choices=("auto", "eager", "sdpa", "triton"),
        help="eager: plain torch, the oracle; triton: kernels, on CUDA",
    )
    a(
        "--runner",
        default="auto",
        choices=("auto", "eager", "compile", "graph"),
        help="who runs a decode step: plain calls, torch.compile (starts late, decodes fast), a CUDA graph",
    )
    a(
        "--random-weights",
        action="store_true",
        help="the named shape with random weights and a byte tokenizer, no download",
    )
    a("--json", metavar="FILE", help="write the result and the cache report")
    a("--explain", action="store_true", help="show per layer which positions survived")
    a(
        "--compare",
        metavar="PLAN",
        help="how far this plan's odds are from another's, such as full, on what that one writes",
    )
    a("--xray", metavar="FILE.html", help="the text, each token as dark as it is still remembered")
    a(
        "--plan",
        action="store_true",
        help="before loading: what each policy would keep of a context of the model's length",
    )
    a("--save-cache", metavar="FILE", help="write the compressed prompt")
    a("--load-cache", metavar="FILE", help="go on from a saved one; the prompt follows it, and its plan holds")
    a("--quiet", action="store_true", help="nothing on stderr but errors")
    a("--list-models", action="store_true")
    a("--list-policies", action="store_true")
    return p


def main(argv: Sequence[str]) -> int:
    # underscores are accepted in flags, as many will type them
    argv = [
        x if not x.startswith("--") else x.partition("=")[0].replace("_", "-") + "".join(x.partition("=")[1:])
        for x in argv
    ]
    args = parser().parse_args(argv)
    try:
        return run(args)
    except ValueError as e:
        if settings().debug:
            raise
        return complain(str(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as e:  # torch says either, and on each device in other words
        if settings().debug or not (isinstance(e, MemoryError) or "memory" in str(e)):
            raise
        return complain("not enough memory; give a shorter prompt, a policy with a smaller budget, or a smaller model")
    except BrokenPipeError:  # the reader of our text has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def complain(message: str) -> int:
    print(f"generate.py: {' '.join(message.split())}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    if args.list_models:
        return list_models()
    if args.list_policies:
        return list_policies()
    text = check(args)
    if args.plan:
        return show_sizes(args)
    from nanokv import Sampling, load
    from nanokv.device import peak_bytes

    plan = parse_plan(args.policy, args.kv_budget, args)
    reference = parse_plan(args.compare, None) if args.compare else None
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    bar = sys.stderr.isatty() and not args.quiet
    llm = load(
        args.model,
        plan,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        runner=args.runner,
        random_weights=args.random_weights,
        bar=bar,
    )
    common = {"limit": args.max_new_tokens, "sampling": sampling, "seed": args.seed, "stop": args.stop}
    common |= {"ignore_eos": args.ignore_eos, "overflow": args.allow_overflow}
    say = (lambda *_: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    plain = llm.device.type != "cpu" and llm.models.ops.name != "triton"
    backend = llm.models.ops.name + (" (decode in plain torch)" if plain else "")
    kept = "the saved plan" if args.load_cache else plan
    say(f"{llm.name} · {kept} · {llm.device} · {dtypes(llm)} · backend {backend} · runner {llm.models.runner.name}")
    if args.interactive:
        return converse(args, llm, text, common, say)
    prompt, then = ids(args, llm, text)
    room = len(then) + args.max_new_tokens
    if args.load_cache:
        from nanokv.cache.save import restore

        prompts, session = [], restore(llm, Path(args.load_cache), room)
    else:
        prompts, session = [prompt], llm.session(room, args.chunk)
    if args.save_cache:
        from nanokv.cache.save import save

        common["compressed"] = lambda: save(llm, session, Path(args.save_cache))
    turn = begin(llm, session, prompts, then, args.num_samples, common, bar)
    show(turn)
    if args.explain:
        draw(session)
    peak, other, problem = peak_bytes(llm.device), None, None  # the peak is this plan's, before another one runs
    if reference and not turn.interrupted:
        try:
            other = compare(llm, reference, prompt, then, args)
            say(f"against {args.compare}, on what greedy writes there: {other}")
        except ValueError as e:  # the answer is there all the same, and its receipt comes first
            problem = str(e)
    for line in end_block(llm, session, turn, peak, args):
        say(line)
    if args.xray:
        from nanokv.inspect.explain import xray

        pieces = [llm.tokenizer.decode([i]) for i in (*prompt, *then, *turn.ids[0])]
        write(args.xray, "--xray", xray(session, pieces))
    if args.json:
        write_json(args.json, llm, session, turn, peak, other)
    if problem:
        return complain(f"--compare {args.compare}: {problem}")
    return 130 if turn.interrupted else 0


STORE_FLAGS = {"k": "--k-bits", "v": "--v-bits", "group": "--kv-group-size", "residual": "--residual"}


def parse_plan(text: str, budget: str | None, args: argparse.Namespace | None = None):
    """--policy, --kv-budget and the flags of its store as a plan."""
    from nanokv import parse
    from nanokv.stores import STORES

    plan = parse(text)
    flags = {key: getattr(args, flag[2:].replace("-", "_"), None) for key, flag in STORE_FLAGS.items()}
    if given := {key: value for key, value in flags.items() if value is not None}:
        named = next((part for part in text.split("+") if part.partition(":")[0].strip() in STORES), "")
        if said := [key for key in given if re.search(rf"[:,]\s*{key}=", named)]:
            raise ValueError(f"{STORE_FLAGS[said[0]]} and {said[0]}= in the policy say the same; give one of them")
        plan = plan.with_store(None if named else "int", given, STORE_FLAGS)
    if budget is None:
        return plan
    if "budget=" in text:
        raise ValueError("--kv-budget and budget= in the policy say the same; give one of them")
    return plan.with_budget(budget)


def show_sizes(args: argparse.Namespace) -> int:
    """--plan: from the shape alone, before anything is fetched or loaded."""
    import torch

    from nanokv.cache.plan import parse
    from nanokv.device import free_bytes
    from nanokv.inspect.explain import sizes
    from nanokv.model.config import ModelConfig
    from nanokv.model.presets import PRESETS
    from nanokv.policies import POLICIES

    if args.model in MODELS:
        config = PRESETS[MODELS[args.model].shape]
    elif Path(args.model).is_dir():
        config = ModelConfig.from_dir(Path(args.model))
    else:
        raise ValueError(f"--plan needs a model's directory or a name of --list-models, not {args.model!r}")
    plans = {args.policy: parse_plan(args.policy, args.kv_budget, args)} | {name: parse(name) for name in POLICIES}
    room = args.max_new_tokens
    n = max(1, config.max_position_embeddings - room)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("\n".join(sizes(config, plans, n, room, torch.bfloat16, free_bytes(device))))
    return 0


def draw(session) -> None:
    from nanokv.inspect.explain import explain

    print(explain(session), file=sys.stderr)


def compare(llm, reference, prompt: list[int], then: list[int], args: argparse.Namespace):
    from nanokv.inspect.fidelity import against

    eos = () if args.ignore_eos else llm.tokenizer.eos
    return against(llm, reference, prompt, then, args.max_new_tokens, eos, args.allow_overflow, args.chunk)


def check(args: argparse.Namespace) -> str | None:
    """What can be refused before a model is loaded. Returns the prompt's text."""
    if args.load_cache and (
        args.chat or args.system or args.interactive or args.question or args.num_samples > 1 or args.xray
    ):
        raise ValueError(
            "--load-cache goes on with the prompt as it stands; leave out --chat, --question, --num-samples and --xray"
        )
    stored = any(getattr(args, flag[2:].replace("-", "_")) for flag in STORE_FLAGS.values())
    if args.load_cache and (args.policy != "full" or args.kv_budget or stored):
        raise ValueError(
            "--load-cache keeps the plan it was saved with; leave out --policy, --kv-budget and the bits of a store"
        )
    if args.compare and (args.load_cache or args.interactive or args.num_samples > 1):
        raise ValueError(
            "--compare reads the prompt again under another plan; leave out --load-cache, --interactive and --num-samples"
        )
    if args.save_cache and (args.interactive or args.num_samples > 1):
        raise ValueError("--save-cache saves one prompt; leave out --interactive and --num-samples")
    if args.plan:
        return None
    if args.json == "-":
        raise ValueError("--json - is not possible, standard output carries the text; give a file")
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no directory {Path(args.json).parent}; make it first")
    if args.json and (Path(args.json).is_dir() or not os.access(Path(args.json).parent, os.W_OK)):
        raise ValueError(f"--json {args.json} cannot be written; give a file in a directory of yours")
    if not all(args.stop):
        raise ValueError("--stop is empty; give a text, or leave it out")
    for flag, value, least in (
        ("chunk", args.chunk, 1),
        ("num-samples", args.num_samples, 1),
        ("max-new-tokens", args.max_new_tokens, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"--{flag} is {value}; give at least {least}")
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; give one of them")
    if args.interactive and (args.question or args.num_samples > 1 or args.json or args.prompt == "-"):
        raise ValueError("--interactive reads the keyboard; leave out --question, --num-samples, --json and -p -")
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError("--num-samples with temperature 0 would print one answer many times; give --temperature 0.8")
    if args.prompt_file is not None or args.prompt == "-":
        where = "standard input" if args.prompt == "-" else f"--prompt-file {args.prompt_file!r}"
        try:
            raw = sys.stdin.buffer.read() if args.prompt == "-" else Path(args.prompt_file).read_bytes()
            text = raw.decode("utf-8").removesuffix("\n")  # the one that editors and echo put at the end
        except OSError as e:
            raise ValueError(f"{where} cannot be read ({e.strerror}); give a text file") from None
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{where} is not UTF-8 (byte {e.start}); convert it first, as with iconv -t utf-8"
            ) from None
    else:
        text = args.prompt
    if text is None and not args.interactive:
        raise ValueError("no prompt; give -p TEXT, --prompt-file FILE, -p - for standard input, or --interactive")
    if text is not None and not text.strip():
        raise ValueError("the prompt is empty; give a text with -p, --prompt-file or on standard input (-p -)")
    if args.question is not None and not args.question.strip():
        raise ValueError("--question is empty; give a question, or leave it out")
    return text


def ids(args: argparse.Namespace, llm, text: str) -> tuple[list[int], list[int]]:
    """The prompt, and what follows on the compressed cache."""
    if args.load_cache:
        return [], llm.tokenizer.encode_more(text)
    if not args.chat and args.system is None:
        then = [] if args.question is None else llm.tokenizer.encode_more(args.question)
        return llm.tokenizer.encode(text), then
    from nanokv.text.chat import cut

    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": text})
    if args.question is not None:
        return cut(llm, messages, args.question)
    return llm.tokenizer.encode(llm.tokenizer.chat(messages), special=False), []


def begin(llm, session, prompts: list[list[int]], then: list[int], copies: int, common: dict, bar: bool):
    """Begin the answer, with a bar when the prompt comes in chunks."""
    from tqdm import tqdm

    with tqdm(total=sum(map(len, prompts)), desc="prefill", unit="tok", leave=False, disable=not bar) as progress:
        return llm.turn(session, prompts, then=then, copies=copies, tick=progress.update, **common)


def show(turn) -> None:
    """Stream one answer; several are printed one after the other when all have ended. Ctrl-C ends it after the step in
    progress, so that the cache stays whole; a second one does not wait."""

    def stop(*_: object) -> None:
        if turn.interrupted:
            raise KeyboardInterrupt
        turn.interrupted = True

    many, before = len(turn.texts) > 1, signal.signal(signal.SIGINT, stop)
    try:
        for _, piece in turn:
            if not many:
                print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    print("\n\n".join(turn.texts) if many else "", flush=True)


def converse(args: argparse.Namespace, llm, text: str | None, common: dict, say) -> int:
    """The REPL. A turn that fails leaves the conversation as it was."""
    from nanokv.text.chat import Conversation

    llm.tokenizer.chat([{"role": "user", "content": "hello"}])  # a model without a template is refused at once

    def answer(session, prompts, then):
        return begin(llm, session, prompts, then, 1, common, False)

    chat = Conversation(llm, args.system, args.max_new_tokens, answer, args.chunk)
    say("/reset forgets, /stats shows the cache, /policy PLAN changes it, /exit ends")
    while True:
        try:
            line, text = (text, None) if text is not None else (read_line(), None)
        except (EOFError, KeyboardInterrupt):
            return 0
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/exit":
                return 0
            if word.startswith("/"):
                print(command(chat, word, rest, args), file=sys.stderr)
            elif word:
                show(chat.say(line))
                chat.heard()
                say(str(chat.session.report()))
                if args.explain:
                    draw(chat.session)
        except ValueError as e:
            complain(str(e))
        except KeyboardInterrupt:
            print("interrupted; the next turn reads the conversation anew", file=sys.stderr)
        if chat.session is not None and not chat.session.whole:
            chat.drop()


def read_line() -> str:
    """The prompt belongs to the person, not to the text: it goes to stderr."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return input()


def command(chat, word: str, rest: str, args: argparse.Namespace) -> str:
    """One of the REPL's commands → what to say about it."""
    if word == "/reset":
        chat.reset()
        return "forgotten"
    if word == "/stats":
        return "nothing is cached yet" if chat.session is None else str(chat.session.report())
    if word == "/policy":
        if rest:
            chat.replan(parse_plan(rest, None if "budget=" in rest else args.kv_budget, args))
        return str(chat.plan)
    return f"unknown command {word}; commands are /reset /stats /policy PLAN /exit"


def dtypes(llm) -> str:
    types = llm.dtypes
    return f"prefill {types['prefill']}, decode {types['decode']} ({llm.why_dtype})"


def rate(n: int, seconds: float) -> float:
    return n / seconds if seconds else 0.0


def end_block(llm, session, turn, peak: int, args: argparse.Namespace) -> list[str]:
    from nanokv.cache.report import mib

    report, name = session.report(), session.plan.names[0]
    lines = [
        f"load {llm.load_s:.2f} s" + (f", compile {turn.compile_s:.2f} s" if turn.compile_s else ""),
        f"prefill {turn.prompt_tokens} tok, {turn.prefill_s:.2f} s, {rate(turn.prompt_tokens, turn.prefill_s):.0f} tok/s",
        f"decode {turn.counted} tok, {turn.decode_s:.2f} s, {rate(turn.counted, turn.decode_s):.1f} tok/s "
        f"(without the first step, the warm-up); ended by {', '.join(dict.fromkeys(turn.reasons))}",
        f"peak memory {mib(peak)}",
    ]
    if args.chunk:
        lines[-1] += "; prefilled in chunks, so the whole prompt's cache was alive at once"
    if name != "full" and not report.short and not session.plan.keep.demotes:
        lines.append(f"{name} had nothing to drop: every layer still holds all {max(report.seen)} tokens")
    notes = [session.plan.store.note(n) for n in dict.fromkeys(turn.lengths)]
    lines += [f"{session.plan.names[1]}: {note}" for note in notes if note]
    spare = report.bytes - report.live_bytes
    if spare > 0.1 * report.bytes:
        lines.append(f"{mib(spare)} of the cache were reserved for new tokens that did not come (-n)")
    return [*lines, str(report)]


def write_json(file: str, llm, session, turn, peak: int, other) -> None:
    from dataclasses import asdict

    import torch

    report = session.report()
    common = {
        "model": llm.name,
        "device": str(llm.device),
        "dtype": llm.dtypes,
        "backend": llm.models.ops.name,
        "runner": llm.models.runner.name,
        "torch": torch.__version__,
        "commit": commit(),
        "prompt_tokens": turn.prompt_tokens,
        "load_s": llm.load_s,
        "compile_s": turn.compile_s,
        "prefill_s": turn.prefill_s,
        "decode_s": turn.decode_s,
        "prefill_tok_s": rate(turn.prompt_tokens, turn.prefill_s),
        "decode_tok_s": rate(turn.counted, turn.decode_s),
        "peak_bytes": peak,
    }
    rows = [
        {
            **common,
            "policy": str(session.plans[i]),
            "new_tokens": len(ids),
            "text": turn.texts[i],
            "token_ids": ids,
            "finish_reason": turn.reasons[i],
            "cache": report.as_dict(i),
        }
        for i, ids in enumerate(turn.ids)
    ]
    if other:
        rows[0]["compare"] = asdict(other)
    result = rows[0] if len(rows) == 1 else {"rows": rows}
    write(file, "--json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def write(file: str, flag: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ValueError(f"{flag} {file} cannot be written ({e.strerror}); the text above is whole") from None


def commit() -> str | None:
    """The project's commit, if it runs from a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def list_models() -> int:
    for name, model in MODELS.items():
        here = "here" if (settings().weights / name / "config.json").is_file() else "fetched when first used"
        source = (
            model.source.repo if isinstance(model.source, Hub) else f"{model.source.package} (Python package index)"
        )
        print(f"{name:26} {here:24} {source}")
    return 0


def list_policies() -> int:
    from nanokv.cache.plan import AXES, canonical
    from nanokv.policies.scorer import Scorer

    for axis, parts in AXES.items():
        print(f"parts that {axis}:")
        for name, part in parts.items():
            print(f"  {canonical(name, part)}\n      {' '.join(type(part).__doc__.split(chr(10) * 2)[0].split())}")
    print(f"what all with layers=, heads=, select= do:\n      {' '.join(Scorer.__doc__.split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
