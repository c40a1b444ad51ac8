"""What the command lines share: a parser, one-line errors, exit statuses, text files, the keyboard and the printed
answer.

It knows no model and no policy, and it does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from nanokv.files import check_outputs
from nanokv.streams import drop_output, write_out
from weights.registry import settings

if TYPE_CHECKING:
    from nanokv.answer import Answer
    from nanokv.compiled import CompileOptions


# of a directory that --model names, what no output may replace
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*token*.json",
    "tokenizer.model",
    "model*.safetensors*",
    "*.gguf",
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the flag that was meant. It also accepts underscores in flags
    (--max_new_tokens), and values that begin with dashes, unless they are flags themselves.
    """

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Only flags are normalised. A value is never changed: it is joined to its flag, so that argparse does not
        look at it.
        """
        given, rest = [], list(args)
        while rest:
            flag = self._with_dashes(rest.pop(0))
            action = self._option_string_actions.get(flag)
            if flag.startswith("--") and flag.partition("=")[0] not in (*self._option_string_actions, "--"):
                self.error(self._about_unknown(flag))  # before argparse takes its value for something else
            takes_one = action is not None and action.nargs is None
            if takes_one and rest and self._with_dashes(rest[0]).partition("=")[0] not in self._option_string_actions:
                flag += "=" + rest.pop(0)
            given.append(flag)
        found, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self.error(self._about_unknown(unknown[0]))
        return found

    def _about_unknown(self, argument: str) -> str:
        flag = argument.partition("=")[0]
        if not flag.startswith("-"):
            return f"{argument!r} belongs to no option; a text with spaces needs quotes, as in -p 'two words'"
        close = difflib.get_close_matches(flag, self._option_string_actions, 2)
        return f"unknown option {flag}; " + (
            f"did you mean {' or '.join(close)}?" if close else "--help lists all options"
        )

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        """argparse drops "--" even where it is a flag's value."""
        is_value = arg_strings == ["--"] and action.nargs is None and action.option_strings
        return self._get_value(action, "--") if is_value else super()._get_values(action, arg_strings)

    def _with_dashes(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        dashed = flag.replace("_", "-")
        return dashed + equals + value if dashed in self._option_string_actions else argument

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        """As argparse's, which says nothing if the message cannot be written."""
        if file is not sys.stdout:
            super()._print_message(message, file)
            return
        try:
            write_out(message)
        except BrokenPipeError:
            drop_output()
        except OSError as e:
            self.error(str(e))

    def error(self, message: str) -> None:
        sys.exit(fail(self.prog, message))


def add_compile_flags(add: Callable[..., object]) -> None:
    """The flags of `compile_options`, for a group of a parser."""
    modes = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
    add("--compile-mode", default="default", choices=modes, help="of --runner compile (default %(default)s)")
    text = "inductor generates code; the others help to find where an error comes from"
    add("--compile-backend", default="inductor", choices=("inductor", "aot_eager", "eager"), help=text)
    text = "auto: shapes that change become dynamic (default)"
    add("--compile-dynamic", default="auto", choices=("auto", "true", "false"), help=text)
    text = "an option of torch._inductor.config; may be given several times"
    add("--compile-option", action="append", default=[], metavar="KEY=VALUE", help=text)


def compile_options(args: argparse.Namespace) -> CompileOptions:
    """What the flags of `add_compile_flags` say. ValueError if torch does not know it."""
    from nanokv.compiled import CompileOptions

    return CompileOptions.parse(args.compile_mode, args.compile_backend, args.compile_dynamic, args.compile_option)


def fail(program: str, message: str) -> int:
    """Print the error as one line on stderr. Return exit status 2."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def exits(
    program: str,
    main: Callable[[], int],
    need_less_memory: str = "give a shorter prompt, a policy with a smaller budget, or a smaller model",
    interrupted: str = "interrupted",
) -> int:
    """Run main() and return the exit status.

    An error that the user can correct is printed as one sentence; NANOKV_DEBUG=1 raises it. A programming error is
    raised.
    """
    try:
        status = main()
        write_out()
        return status
    except BrokenPipeError:  # the program that reads our output has closed it
        drop_output()
        return 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (ValueError, OSError) as e:
        if settings().debug:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            drop_output()
        return fail(program, str(e))
    except (MemoryError, RuntimeError) as e:  # torch raises either one, with a different message on each device
        out_of_memory = isinstance(e, MemoryError) or "memory" in str(e)
        if settings().debug or not out_of_memory:
            raise
        return fail(program, f"not enough memory; {need_less_memory}")


def attempt(what: str, work: Callable[[], object]) -> str:
    """Run work() after an answer, whose receipt and files must come out in any case. Return the error, or ""."""
    try:
        work()
    except ValueError as e:
        return f"{what}: {e}" if what else str(e)
    return ""


def shows_progress(quiet: bool = False) -> bool:
    """Progress bars are drawn on a terminal only."""
    return sys.stderr.isatty() and not quiet


def print_answer(answer: Answer, go_on: bool = False) -> str:
    """Print one answer while it is generated. Several answers are printed one after the other at the end.

    If standard output cannot be written, this raises as `write_out` does. With `go_on`, because the answer has
    another place to go to, it is generated to its end, and the error is returned; otherwise the result is "".

    Ctrl-C ends the answer after the current step, so that the cache stays complete. A second Ctrl-C ends it at once.
    """

    def interrupt(*_: object) -> None:
        if answer.interrupted:
            raise KeyboardInterrupt
        answer.interrupted = True

    several, previous = len(answer.texts) > 1, signal.signal(signal.SIGINT, interrupt)
    error, is_open = "", True

    def show(text: str) -> None:
        nonlocal error, is_open
        try:
            if is_open:
                write_out(text)
        except OSError as e:
            if not go_on:
                raise
            drop_output()
            error, is_open = "" if isinstance(e, BrokenPipeError) else str(e), False

    try:
        for _, piece in answer:
            if not several:
                show(piece)
    finally:
        signal.signal(signal.SIGINT, previous)
    show(("\n\n".join(answer.texts) if several else "") + "\n")
    return error


def read_text(source: str, read: Callable[[], bytes]) -> str:
    """The UTF-8 text that read() returns as bytes. `source` names it in an error."""
    try:
        text = read().decode("utf-8-sig")  # some editors put a byte order mark first
        return text[: -2 if text.endswith("\r\n") else -1] if text.endswith("\n") else text  # and one line break last
    except OSError as e:
        raise ValueError(f"{source} cannot be read ({e.strerror}); give a text file") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{source} is not UTF-8 (byte {e.start}); convert it first, as with iconv -t utf-8") from None


def read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt's text, from -p, --prompt-file or standard input. None: a conversation that begins at the keyboard."""
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; give one of them")
    if args.interactive and args.prompt == "-":
        raise ValueError("--interactive reads the keyboard; leave out -p -")
    text = args.prompt
    if text == "-":
        text = read_text("standard input", lambda: sys.stdin.buffer.read())
    elif args.prompt_file is not None:
        text = read_text(f"--prompt-file {args.prompt_file!r}", lambda: Path(args.prompt_file).read_bytes())
    if text is None and not args.interactive:
        raise ValueError("no prompt; give -p TEXT, --prompt-file FILE, -p - for standard input, or --interactive")
    if text is not None and not text.strip():
        raise ValueError("the prompt is empty; give a text with -p, --prompt-file or on standard input (-p -)")
    return text


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError for an output that cannot be written, or that is a file which this run reads or writes."""
    outputs, model = {"--json": args.json, "--save-cache": args.save_cache, "--xray": args.xray}, Path(args.model)
    own = [model]
    with suppress(OSError):  # a name that is too long for a file is no directory; loading says so
        own = [f for pattern in MODEL_FILES for f in model.glob(pattern)] if model.is_dir() else own
    inputs = {f"--model's {f.name}": f for f in own}
    check_outputs(outputs, {"--prompt-file": args.prompt_file, **inputs})
    check_outputs({**outputs, "--save-cache": None}, {"--load-cache": args.load_cache})  # it may be written back
    if args.load_cache and not os.path.exists(args.load_cache):
        raise ValueError(f"--load-cache {args.load_cache} is not there; give a file that --save-cache has written")


def read_lines(first: str | None = None) -> Iterator[str]:
    """`first`, if it is given, and then what the user types, until the input ends or Ctrl-C. The prompt goes to
    stderr.
    """
    if first is not None:
        yield first
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except (EOFError, KeyboardInterrupt):
            return
        # bytes that the terminal's encoding does not know are read as surrogates; they may still be UTF-8
        known = line.isprintable() or max(line) < "\udc80"
        yield line if known else line.encode(sys.stdin.encoding, "surrogateescape").decode("utf-8", "surrogateescape")
