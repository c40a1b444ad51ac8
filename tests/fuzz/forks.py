"""Try many cases in forked children, with a limit of time for each and of memory above what the child began with.

A child goes through the cases one after the other and reports each outcome. If it dies, the case it was at is a hang or a
crash, and a new child goes on behind it.
"""

from __future__ import annotations

import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

HANG_S = 5
BATCH = 250  # cases of one child, so that what the allocator keeps does not add up to the limit
BLOW_UP = 200 << 20  # bytes above the start, beside four times the file
GOOD = ("refused", "equal", "different")


@dataclass
class Outcomes:
    """How often each outcome came, and what was said of the bad ones."""

    counts: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{n} {name}" for name, n in sorted(self.counts.items()))


def attempt_all(cases: range, attempt: Callable[[int], str], file_bytes: int = 0) -> Outcomes:
    """attempt(i) returns "equal" or "different", or "silent: …" if it took what it should have refused; a ValueError of one
    sentence is a refusal. Everything else that it does is a fault.
    """
    found, at = Outcomes(), cases.start
    while at < cases.stop:
        end = min(at + BATCH, cases.stop)
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            _child(range(at, end), attempt, 4 * file_bytes + BLOW_UP, writer)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, why = line.rstrip("\n").partition("\t")
                _note(found, at, name, why)
                at += 1
        _, status = os.waitpid(pid, 0)
        if at < end:
            killer = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            _note(found, at, "hang" if killer == signal.SIGALRM else "crash", f"status {status}")
            at += 1
    return found


def _note(found: Outcomes, i: int, name: str, why: str) -> None:
    found.counts[name] += 1
    if name not in GOOD:
        found.bad.append(f"case {i}: {name} {why}")


def _child(cases: range, attempt: Callable[[int], str], memory: int, writer: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as f:
        size = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic in a library prints there before it can be caught
    for i in cases:
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            name, _, why = attempt(i).partition(": ")
        except ValueError as e:
            blew_up = isinstance(e.__context__, MemoryError)
            name, why = ("blow-up", "") if blew_up else ("refused", "") if _is_sentence(str(e)) else ("unsaid", repr(e))
        except MemoryError:
            name, why = "blow-up", ""
        except BaseException as e:
            name, why = "traceback", _where(e)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(writer, f"{name}\t{why[:300]}\n".replace("\r", " ").encode("utf-8", "replace"))
    os._exit(0)


def _is_sentence(text: str) -> bool:
    return 10 < len(text) < 1000 and "\n" not in text and text.isprintable()


def _where(e: BaseException) -> str:
    last = e.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return (
        f"{type(e).__name__}: {' '.join(str(e).split())[:120]} ({os.path.basename(code.co_filename)}:{last.tb_lineno})"
    )
