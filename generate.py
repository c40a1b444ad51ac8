"""Text from a model under a KV-cache policy: `python generate.py --model llama2-7b --policy simlayer -p "…"`.

The text goes to stdout, everything else to stderr. What the flags mean: --help; what each policy does: --list-policies.
"""

from __future__ import annotations

import argparse
import json
import os
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
    a("--backend", default="auto", choices=("auto", "eager", "sdpa"), help="eager is plain torch, the oracle")
    a(
        "--random-weights",
        action="store_true",
        help="the named shape with random weights and a byte tokenizer, no download",
    )
    a("--json", metavar="FILE", help="write the result and the cache report")
    a("--explain", action="store_true", help="show per layer which positions survived")
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
        print("interrupted before the first token", file=sys.stderr)
        return 130
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
    from nanokv import Sampling, load, parse

    plan = parse(args.policy)
    if args.kv_budget is not None:
        if "budget=" in args.policy:
            raise ValueError("--kv-budget and budget= in --policy say the same; give one of them")
        plan = plan.with_budget(args.kv_budget)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    bar = sys.stderr.isatty() and not args.quiet
    llm = load(
        args.model,
        plan,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        random_weights=args.random_weights,
        bar=bar,
    )
    common = {"limit": args.max_new_tokens, "sampling": sampling, "seed": args.seed, "stop": args.stop}
    common |= {"ignore_eos": args.ignore_eos, "overflow": args.allow_overflow}
    say = (lambda *_: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    say(f"{llm.name} · {plan} · {llm.device} · {dtypes(llm)} · backend {llm.models.ops.name} · runner eager")
    if args.interactive:
        return converse(args, llm, text, common, say)
    prompt, then = ids(args, llm, text)
    session = llm.session(len(then) + args.max_new_tokens, args.chunk)
    turn = prefill(llm, session, [prompt], then, args.num_samples, common, bar)
    status = show(turn)
    for line in end_block(llm, session, turn, args):
        say(line)
    if args.explain and session.cache is not None:
        from nanokv.explain import explain

        print(explain(session), file=sys.stderr)
    if args.json:
        write_json(args.json, llm, session, turn)
    return status


def check(args: argparse.Namespace) -> str | None:
    """What can be refused before a model is loaded. Returns the prompt's text."""
    if args.json == "-":
        raise ValueError("--json - is not possible, standard output carries the text; give a file")
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no directory {Path(args.json).parent}; make it first")
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
        where = args.prompt_file or "standard input"
        try:
            raw = sys.stdin.buffer.read() if args.prompt == "-" else Path(args.prompt_file).read_bytes()
            text = raw.decode("utf-8")
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
    if not args.chat and args.system is None:
        then = [] if args.question is None else llm.tokenizer.encode(args.question, special=False)
        return llm.tokenizer.encode(text), then
    from nanokv.chat import cut

    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": text})
    if args.question is not None:
        return cut(llm, messages, args.question)
    return llm.tokenizer.encode(llm.tokenizer.chat(messages), special=False), []


def prefill(llm, session, prompts: list[list[int]], then: list[int], copies: int, common: dict, bar: bool):
    """Begin the answer, with a bar when the prompt comes in chunks."""
    from tqdm import tqdm

    with tqdm(total=sum(map(len, prompts)), desc="prefill", unit="tok", leave=False, disable=not bar) as progress:
        return llm.turn(session, prompts, then=then, copies=copies, tick=progress.update, **common)


def show(turn) -> int:
    """Stream one answer; several are printed one after the other when all have ended. Status 130 if interrupted."""
    many, status = len(turn.texts) > 1, 0
    try:
        for _, piece in turn:
            if not many:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        status = 130
        for _, piece in turn.interrupt():
            if not many:
                print(piece, end="")
    if many:
        print("\n\n".join(turn.texts), end="")
    print(flush=True)
    return status


def converse(args: argparse.Namespace, llm, text: str | None, common: dict, say) -> int:
    """The REPL. A turn that fails leaves the conversation as it was."""
    from nanokv import parse
    from nanokv.chat import Conversation

    def answer(session, prompts, then):
        return prefill(llm, session, prompts, then, 1, common, False)

    chat = Conversation(llm, args.system, args.max_new_tokens, answer, args.chunk)
    say("/reset forgets, /stats shows the cache, /policy PLAN changes it, /exit ends")
    while True:
        try:
            line = text if text is not None else input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        text, word = None, line.strip().partition(" ")
        try:
            if word[0] == "/exit":
                return 0
            if word[0] == "/reset":
                chat.reset()
            elif word[0] == "/stats":
                report = None if chat.session is None else chat.session.report()
                say("nothing is cached yet" if report is None else str(report))
            elif word[0] == "/policy":
                if word[2]:
                    chat.replan(parse(word[2]))
                say(str(chat.plan))
            elif word[0].startswith("/"):
                say(f"unknown command {word[0]}; commands are /reset /stats /policy PLAN /exit")
            elif line.strip():
                show(chat.say(line))
                chat.heard()
        except ValueError as e:
            complain(str(e))


def dtypes(llm) -> str:
    types = llm.dtypes
    return f"prefill {types['prefill']}, decode {types['decode']} ({llm.why_dtype})"


def rate(n: int, seconds: float) -> float:
    return n / seconds if seconds else 0.0


def end_block(llm, session, turn, args: argparse.Namespace) -> list[str]:
    from nanokv.cache import mib
    from nanokv.llm import peak_bytes

    rows = len(turn.ids)
    lines = [
        f"load {llm.load_s:.2f} s",
        f"prefill {turn.prompt_tokens} tok, {turn.prefill_s:.2f} s, {rate(turn.prompt_tokens, turn.prefill_s):.0f} tok/s",
        f"decode {turn.steps * rows} tok, {turn.decode_s:.2f} s, {rate(turn.steps * rows, turn.decode_s):.1f} tok/s "
        "(without the first step, the warm-up)",
        f"peak memory {mib(peak_bytes(llm.device))}",
    ]
    report = session.report()
    if report is None:
        return lines
    if args.chunk:
        lines[-1] += "; prefilled in chunks, so the whole prompt's cache was alive at once"
    if session.plan.names[0] != "full" and not report.short:
        lines.append(
            f"{session.plan.names[0]} had nothing to drop: all {turn.prompt_tokens} tokens are within what it keeps"
        )
    return [*lines, str(report)]


def write_json(file: str, llm, session, turn) -> None:
    import torch

    from nanokv.llm import peak_bytes

    report, rows = session.report(), len(turn.ids)
    top = {
        "model": llm.name,
        "policy": str(session.plans[0]),
        "device": str(llm.device),
        "dtype": llm.dtypes,
        "backend": llm.models.ops.name,
        "runner": "eager",
        "torch": torch.__version__,
        "commit": commit(),
        "prompt_tokens": turn.prompt_tokens,
    }
    times = {
        "load_s": llm.load_s,
        "compile_s": 0.0,
        "prefill_s": turn.prefill_s,
        "decode_s": turn.decode_s,
        "prefill_tok_s": rate(turn.prompt_tokens, turn.prefill_s),
        "decode_tok_s": rate(turn.steps * rows, turn.decode_s),
        "peak_bytes": peak_bytes(llm.device),
        "cache": None if report is None else report.as_dict(),
    }
    answers = [
        {"new_tokens": len(i), "text": t, "token_ids": i, "finish_reason": r}
        for i, t, r in zip(turn.ids, turn.texts, turn.reasons, strict=True)
    ]
    result = {**top, **answers[0], **times} if rows == 1 else {**top, "rows": answers, **times}
    Path(file).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    from nanokv.plan import AXES, canonical

    for axis, parts in AXES.items():
        print(f"parts that {axis}:")
        for name, part in parts.items():
            print(f"  {canonical(name, part)}\n      {' '.join(type(part).__doc__.split(chr(10) * 2)[0].split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
