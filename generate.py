"""Generate text under a KV-cache policy, as in: generate.py --policy snapkv:budget=25% --prompt-file README.md

The text goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nanokv import cli, streams
from nanokv.files import write_text
from weights.registry import DEFAULT, describe_models

PROGRAM = "generate.py"
AUTO = "auto"  # --policy: the plan is chosen for the prompt
STORE_FLAGS = {"k": "--k-bits", "v": "--v-bits", "group": "--kv-group-size", "residual": "--residual"}


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--model M] [--policy PLAN] (-p TEXT | --prompt-file FILE | --interactive) [options]",
        description="Generate text under a KV-cache policy. The text goes to stdout, everything else to stderr.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
    )
    a = p.add_argument_group(
        "prompt", 'as in --chat --prompt-file book.txt --question "Who is the narrator?"'
    ).add_argument
    a("-p", "--prompt", metavar="TEXT", help="the prompt; - reads standard input")
    a("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    a("--question", metavar="TEXT", help="follows the prompt, which is compressed without having seen it")
    a("--chat", action="store_true", help="put the prompt into the model's chat template")
    a("--system", metavar="TEXT", help="system message; implies --chat")
    a("--interactive", action="store_true", help="chat on one compressed cache: /reset /stats /policy PLAN /exit")
    a("--allow-overflow", action="store_true", help="continue beyond the model's context")

    a = p.add_argument_group("model", "as in --model llama3-8b").add_argument
    a("--model", default=DEFAULT, metavar="M", help="directory, .gguf file, name or hub id (default %(default)s)")
    a("--random-weights", action="store_true", help="the named shape with random weights; downloads nothing")
    a("--list-models", action="store_true", help="print the names and exit")

    a = p.add_argument_group("cache", "as in --policy snapkv:budget=25%+int4").add_argument
    a("--policy", default="full", metavar="PLAN", help="as in snapkv:budget=512+int4; auto tries several on the prompt")
    a("--kv-budget", metavar="N", help="the policy's budget for the prompt: 512 | 25%% | 256MiB")
    a("--k-bits", metavar="N", help="bits per key number; without a store in the plan, the store is int")
    a("--v-bits", metavar="N", help="bits per value number")
    a("--kv-group-size", metavar="N", help="how many numbers share a scale")
    a("--residual", metavar="N", help="how many of the last tokens are not quantized")
    a("--save-cache", metavar="FILE", help="write the compressed prompt; after --load-cache, all that was fed")
    a("--load-cache", metavar="FILE", help="continue from a saved cache under its own plan; the prompt follows it")
    a("--plan", action="store_true", help="print what each policy would keep of a full context and exit; loads nothing")
    a("--list-policies", nargs="?", const="", metavar="NAME", help="list policies and stores, or explain one, and exit")

    a = p.add_argument_group("sampling", "as in --temperature 0.8 --top-p 0.9 --num-samples 3").add_argument
    a("-n", "--max-new-tokens", "--max-tokens", type=int, default=256, metavar="N", help="default %(default)s")
    a("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    a("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0 is all (default)")
    a("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of total probability P")
    a("--min-p", type=float, default=0.0, metavar="P", help="drop tokens less likely than P times the likeliest")
    a("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    a("--num-samples", type=int, default=1, metavar="N", help="sample N answers after one prefill")
    a("--beams", type=int, default=1, metavar="N", help="search with N beams; the likeliest text is the answer")
    a("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    a("--ignore-eos", action="store_true", help="do not end at the end-of-text token (for timing)")

    a = p.add_argument_group("output", "as in --json out.json --explain").add_argument
    a("--json", metavar="FILE", help="write the result and the cache report")
    a("--explain", action="store_true", help="show for each layer which positions are still cached")
    a("--explain-backends", action="store_true", help="show which functions and kernels ran, where and how often")
    a("--xray", metavar="FILE.html", help="write the text as a page; a token is darker the more heads still hold it")
    a("--compare", metavar="PLAN", help="measure the difference from another plan, such as full, on what that writes")
    a("--quiet", action="store_true", help="print nothing on stderr but errors and what --explain shows")

    a = p.add_argument_group("speed", "as in --device cuda --runner compile").add_argument
    backends, runners = ("auto", "eager", "sdpa", "triton"), ("auto", "eager", "compile", "graph")
    a("--device", default="auto", metavar="D", help="auto | cpu | cuda | mps")
    a("--dtype", default="auto", metavar="T", help="auto | float32 | bfloat16 | float16, or PREFILL/DECODE types")
    a(
        "--backend",
        default="auto",
        choices=backends,
        help="sdpa: torch's kernels; triton: ours, for CUDA; eager: the reference",
    )
    a("--runner", default="auto", choices=runners, help="decode steps by plain calls, torch.compile or a CUDA graph")
    a("--chunk", type=int, metavar="N", help="prefill N tokens at a time; the whole cache is held until the end")
    a("--draft", metavar="D", help="guess tokens and check them in one pass: lookup, or the plan of a second cache")
    a("--draft-model", metavar="M", help="a smaller model writes the draft, under the plan of --draft or full")
    a("--draft-tokens", type=int, metavar="N", help="how many tokens a draft has at most (default 4)")
    cli.add_compile_flags(a)
    return p


def main(argv: Sequence[str]) -> int:
    stdout_is_open = streams.prepare()
    args = parser().parse_args(argv)
    return cli.exits(PROGRAM, lambda: run(args, stdout_is_open))


def run(args: argparse.Namespace, stdout_is_open: bool = True) -> int:
    if not (stdout_is_open or args.json or args.xray):
        raise ValueError("standard output is closed, so the answer would be lost; open it, or give --json FILE")
    if args.list_models:
        print(describe_models())
        return 0
    if args.list_policies is not None:
        from nanokv.inspect.parts import explain_part, list_parts

        print(explain_part(args.list_policies) if args.list_policies else list_parts())
        return 0
    check_flags(args)
    if args.plan:
        from nanokv.inspect.explain import sizes

        # --policy full stands for no policy: the other rows show the budget
        plan = make_plan(args, args.policy, None if args.policy == "full" else args.kv_budget)
        print(sizes(args.model, {args.policy: plan}, args.max_new_tokens, args.kv_budget))
        return 0
    cli.check_files(args)
    text = cli.read_prompt(args)

    from nanokv import Sampling, load, parse
    from nanokv.summary import first_line

    plan = parse("full") if args.policy == AUTO else make_plan(args, args.policy, args.kv_budget)
    if args.draft or args.draft_model:
        from nanokv.speculate import check_plans, draft_plan

        writes = draft_plan(args.draft or "full")  # a mistake is told before a model is loaded
        if not args.load_cache:
            check_plans(plan, writes)
    reference = parse(args.compare) if args.compare else None
    options = {
        "limit": args.max_new_tokens,
        "sampling": Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p),
        "seed": args.seed,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
        "beams": args.beams,
        "overflow": args.allow_overflow,
    }
    given = {"device": args.device, "dtype": args.dtype, "backend": args.backend}
    given |= {"random_weights": args.random_weights, "bar": cli.shows_progress(args.quiet)}
    llm = load(
        args.model,
        plan,
        runner=args.runner,
        compile_options=cli.compile_options(args),
        watch=args.explain_backends,
        **given,
    )
    if args.draft or args.draft_model:
        writer = load(args.draft_model, **given) if args.draft_model else llm
        options["speculation"] = llm.speculation(args.draft or "full", args.draft_tokens or 4, writer)
    place = None  # where the text of a saved cache ends in the chat template
    if args.load_cache:
        from nanokv.save import place_of

        place = place_of(Path(args.load_cache))
    if (args.chat or args.system is not None or args.interactive or place) and not args.ignore_eos:
        from nanokv.text.chat import stops

        options["stop"] = stops(llm, args.stop)
    for note in llm.notes:
        log(args, note)
    if args.interactive:
        log(args, first_line(llm, str(plan)))
    status = (
        converse(args, llm, text, options) if args.interactive else answer(args, llm, text, options, reference, place)
    )
    if args.explain_backends:
        print(llm.calls.table(llm.models.runner.name), file=sys.stderr)
    return status


def log(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr)


# ---- flags and files, checked before a model is loaded ---------------------------------------------------------------

CONFLICTS = (  # a flag, why it excludes others, and which ones
    ("--load-cache", "continues in the chat template if the prompt was saved in it", "--chat --system"),
    ("--load-cache", "continues the saved prompt", "--interactive --question --num-samples --xray"),
    ("--load-cache", "keeps the saved plan", "--policy --kv-budget --k-bits --v-bits --kv-group-size --residual"),
    ("--compare", "reads the prompt again under another plan", "--load-cache --interactive --num-samples"),
    ("--save-cache", "saves one prompt", "--interactive --num-samples"),
    ("--interactive", "reads the keyboard", "--question --num-samples --json --xray"),
    ("--xray", "draws one answer", "--num-samples"),
    (
        "--beams",
        "searches for one text",
        "--temperature --num-samples --draft --draft-model --interactive --save-cache",
    ),
    ("--beams", "starts from a prompt", "--load-cache"),
    ("--beams", "leaves in the cache other texts than the answer", "--xray --explain"),
    ("--draft", "is written for one row", "--num-samples"),
    ("--draft-model", "writes for one row", "--num-samples"),
    ("--plan", "reckons with a full context", "--prompt --prompt-file --question"),
    ("--plan", "answers nothing", "--json --xray --save-cache --load-cache --compare --draft --draft-model --beams"),
)


def value_of(args: argparse.Namespace, flag: str) -> object:
    return getattr(args, flag[2:].replace("-", "_"))


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that exclude each other and for values that no run accepts."""
    defaults = parser().parse_args([])

    def given(flag: str) -> bool:
        return bool(value_of(args, flag)) and value_of(args, flag) != value_of(defaults, flag)

    for flag, reason, others in CONFLICTS:
        if given(flag) and (excluded := [other for other in others.split() if given(other)]):
            raise ValueError(f"{flag} {reason}; leave out {' and '.join(excluded)}")
    for flag in (f"--{name.replace('_', '-')}" for name, value in vars(args).items() if value == ""):
        if flag not in ("--prompt", "--list-policies"):  # the prompt has its own error
            raise ValueError(f"{flag} is empty; give a value, or leave it out")
    for flag in ("--chunk", "--num-samples", "--max-new-tokens", "--draft-tokens", "--beams"):
        value = value_of(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; give at least 1")
    if args.policy == AUTO:
        flags = "--interactive", "--load-cache", "--plan", "--draft", "--draft-model", *STORE_FLAGS.values()
        if excluded := [flag for flag in flags if given(flag)]:
            raise ValueError(f"--policy auto tries plans on one prompt; leave out {' and '.join(excluded)}")
        if args.kv_budget is None:
            raise ValueError("--policy auto chooses a plan for a budget; give --kv-budget 25%, 512 or 64MiB")
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError("--num-samples with temperature 0 would print one answer many times; give --temperature 0.8")
    if args.draft == "lookup" and args.draft_model:
        raise ValueError("--draft lookup needs no model; leave out --draft-model, or give a plan as --draft")
    if args.draft_tokens is not None and not (args.draft or args.draft_model):
        raise ValueError("--draft-tokens is of a draft, and there is none; give --draft or --draft-model")
    if not all(args.stop):
        raise ValueError("--stop is empty; give a text, or leave it out")
    if args.question is not None and not args.question.strip():
        raise ValueError("--question is empty; give a question, or leave it out")


def make_plan(args: argparse.Namespace, text: str, budget: str | None):
    """The plan of a PLAN text, with the values of --kv-budget and of the store's flags."""
    from nanokv import parse
    from nanokv.stores import STORES

    plan = parse(text)
    given = {key: value for key, flag in STORE_FLAGS.items() if (value := value_of(args, flag)) is not None}
    if given:
        store = next((part for part in text.split("+") if part.partition(":")[0].strip() in STORES), "")
        for key in given:
            if re.search(rf"[:,]\s*{key}=", store):
                raise ValueError(f"{STORE_FLAGS[key]} and {key}= in the policy say the same; give one of them")
        plan = plan.with_store(None if store else "int", given, STORE_FLAGS)
    if budget is None:
        return plan
    if "budget=" in text:
        raise ValueError("--kv-budget and budget= in the policy say the same; give one of them")
    return plan.with_budget(budget)


# ---- what a run does -------------------------------------------------------------------------------------------------


def answer(args: argparse.Namespace, llm, text: str, options: dict, reference, place: str | None) -> int:
    """Answer one prompt, print the answer and then what the flags ask for. place: where the text of --load-cache ends in the
    chat template; None: it is plain text.
    """
    from tqdm import tqdm

    from nanokv.inspect.explain import explain
    from nanokv.inspect.fidelity import against
    from nanokv.inspect.xray import xray
    from nanokv.save import restore, save
    from nanokv.summary import as_record, end_block, first_line
    from nanokv.text.chat import encode_later, encode_prompt

    tried = None
    if args.load_cache:
        prompt, question = [], encode_later(llm, text, place)
        session = restore(llm, Path(args.load_cache), len(question) + args.max_new_tokens)
    else:
        prompt, question = encode_prompt(llm, text, args.question, args.chat, args.system)
        if args.policy == AUTO:
            llm.plan, tried = try_plans(args, llm, prompt, len(question) + args.max_new_tokens)
        session = llm.session(len(question) + args.max_new_tokens, args.chunk)
    log(args, first_line(llm, str(session.fitted_plan(len(prompt), max(args.num_samples, args.beams)))))
    if args.save_cache and not args.load_cache:
        in_chat = args.chat or args.system is not None
        ends = ("answer" if args.question is None else "question") if in_chat else None
        options = {**options, "on_compressed": lambda: save(llm, session, Path(args.save_cache), ends)}
    hidden = not cli.shows_progress(args.quiet)
    to_feed = len(prompt) + sum(session.pass_lengths(prompt, max(args.num_samples, args.beams)) if prompt else [])
    with tqdm(total=to_feed, desc="prefill", unit="tok", leave=False, disable=hidden) as bar:
        prompts = [] if args.load_cache else [prompt]
        result = llm.answer(session, prompts, then=question, copies=args.num_samples, progress=bar.update, **options)
    error = cli.print_answer(result, go_on=bool(args.json or args.xray or args.save_cache))
    if args.explain:
        print(explain(session), file=sys.stderr)
    lines = end_block(llm, result)  # made now, as the record is: --compare would raise the peak memory
    record = as_record(llm, result) if args.json else {}
    if tried:
        record["auto"] = tried
    if args.save_cache and args.load_cache:  # with what was loaded, all that followed it

        def save_all() -> None:
            result.feed_rest()
            save(llm, session, Path(args.save_cache), "answer" if place else None)

        error = cli.attempt(f"--save-cache {args.save_cache}", save_all) or error
    if reference and not result.interrupted:

        def compare() -> None:
            eos = () if args.ignore_eos else llm.tokenizer.eos
            limits = args.max_new_tokens, eos, args.allow_overflow, args.chunk
            t0, fidelity = time.perf_counter(), against(llm, reference, prompt, question, *limits)
            took = f"{time.perf_counter() - t0:.1f} s"
            log(args, f"compared with {args.compare} in {took}, on the text that it writes greedily: {fidelity}")
            record["compare"] = asdict(fidelity)

        error = cli.attempt(f"--compare {args.compare}", compare) or error
    log(args, lines)
    pages = {"--json": lambda: json.dumps(record, indent=1, ensure_ascii=False) + "\n"}
    pages["--xray"] = lambda: xray(session, [llm.tokenizer.decode([i]) for i in (*prompt, *question, *result.ids[0])])
    for flag, make in pages.items():
        if file := value_of(args, flag):
            error = cli.attempt("", lambda flag=flag, file=file, make=make: write_text(flag, file, make())) or error
    if error:
        return cli.fail(PROGRAM, error)
    return 130 if result.interrupted else 0


def try_plans(args: argparse.Namespace, llm, prompt: Sequence[int], room: int):
    """(the plan that keeps this prompt best under the budget, the trial for --json). What was tried goes to stderr."""
    from nanokv.auto import candidates, choose

    n, t0 = len(candidates(args.kv_budget)), time.perf_counter()
    log(args, f"auto tries up to {n} plans on the {len(prompt)} tokens of the prompt")
    trials = choose(llm, prompt, args.kv_budget, room)
    seconds, best, unfit = time.perf_counter() - t0, trials[0], n - len(trials)
    log(args, f"auto: KL to full on the prompt's last tokens, lower is better: {' · '.join(map(str, trials))}")
    if unfit:
        log(args, f"auto: {unfit} more plans cannot serve this prompt under {args.kv_budget}")
    log(args, f"auto takes {best.name} with --kv-budget {args.kv_budget}; the trial took {seconds:.2f} s")
    tried = [{"name": t.name, "kl": t.kl, "same": t.same, "bytes": t.bytes} for t in trials]
    return llm.ready(best.plan), {"seconds": seconds, "trials": tried}


def converse(args: argparse.Namespace, llm, text: str | None, options: dict) -> int:
    """Chat until /exit or the end of the input."""
    from nanokv.inspect.explain import explain
    from nanokv.speculate import check_plans
    from nanokv.summary import drafts
    from nanokv.text.chat import Conversation, repl

    def parse_plan(text: str):
        plan = make_plan(args, text, None if "budget=" in text else args.kv_budget)
        if "speculation" in options:
            check_plans(plan, None)
        return plan

    def report(session) -> None:
        log(args, str(session.report()))
        if "speculation" in options:
            log(args, drafts(options["speculation"]))
        if "%" in str(chat.plan):
            log(args, f"percentages are of the first turn: {session.fitted_plan(0)}")
        if args.explain:
            print(explain(session), file=sys.stderr)

    chat = Conversation(llm, args.system, options, args.chunk)
    log(args, "/reset forgets the conversation, /stats shows the cache, /policy PLAN changes the plan, /exit ends")
    repl(chat, cli.read_lines(text), parse_plan, report, lambda message: cli.fail(PROGRAM, message))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
