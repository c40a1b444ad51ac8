"""A @triton.jit kernel compiled for an NVIDIA target without a GPU, and what its machine code looks like.

Not for a process with TRITON_INTERPRET set. ptxas, nvdisasm and cuobjdump all come in the triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

LABEL = re.compile(r"(\.[\w.$]+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+)?\s*([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"(.*)`\((\.L[\w.$]+)\)")  # of a branch, after what else it depends on


@dataclass(frozen=True)
class Machine:
    registers: int  # per thread
    stack: int  # bytes per thread; anything above 0 is a spill or an array that was indexed at run time
    shared: int  # bytes per block, without the 1 KB that sm_80 and later reserve
    mma: int  # tensor core instructions in the whole kernel
    wide_loads: int  # 128-bit loads from global memory, to shared memory or to registers
    narrow_loads: int  # the other ones
    loop: int  # instructions in the longest innermost loop, 0 where there is none
    text: str  # the SASS


def compile(  # noqa: A001
    fn, signature: dict[str, str], constants: dict, arch: int, warps: int, stages: int, unaligned: tuple[str, ...] = ()
) -> Machine:
    """`signature` is name → triton type of each argument that is not a constexpr, `constants` has all the others. Pointers and
    integers count as divisible by 16, which the launcher would find out at run time, unless they are in `unaligned`.
    """
    if not isinstance(fn, JITFunction):
        raise TypeError(f"{fn} is not a compilable kernel: was triton imported with TRITON_INTERPRET set?")
    if {*signature, *unaligned} - {*fn.arg_names} or {*signature} ^ {*constants} != {*fn.arg_names}:
        raise ValueError(f"{fn.__name__} takes {fn.arg_names}, not {[*signature]} and the constants {[*constants]}")
    aligned = [k for k, v in signature.items() if k not in unaligned and (v[0] == "*" or v in ("i32", "i64"))]
    source = triton.compiler.ASTSource(
        fn=fn,
        signature={name: signature.get(name, "constexpr") for name in fn.arg_names},
        constexprs=constants,
        attrs={(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools, name = triton.knobs.nvidia, compiled.metadata.name
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run(tools.cuobjdump.path, "-res-usage", cubin)
        text = run(tools.nvdisasm.path, "-c", cubin)
    used = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", usage)
    ops, after, labels = parse(text)
    spills = sum(op[0] in ("LDL", "STL") for op in ops)
    wide = ["128" in op for op in ops if op[0] in ("LDG", "LDGSTS")]  # a part of its own: .LTC128B is an L2 hint
    return Machine(
        registers=int(used[1]),
        stack=int(used[2]) or 4 * spills,
        shared=compiled.metadata.shared,  # allotted at launch: the cubin does not know it
        mma=sum(op[0].endswith("MMA") for op in ops),
        wide_loads=sum(wide),
        narrow_loads=len(wide) - sum(wide),
        loop=longest(after, labels[f".text.{name}"]),
        text=text,
    )


def run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse(text: str) -> tuple[list[list[str]], list[set[int]], dict[str, int]]:
    """nvdisasm's text → each instruction's name in parts, the instructions that can come after it, label → instruction."""
    ops, jumps, labels = [], [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(ops)
        elif instruction := INSTRUCTION.match(line):
            guard, name, operands = instruction.groups()
            op, branch = name.split("."), TARGET.match(operands)
            leaves = op[0] in ("EXIT", "RET") or (op[0] == "BRA" and branch and not branch[1])
            # ptxas writes a jump as a call at times. BRA.DIV leads to copies of shuffles, for a warp that diverged.
            jumps_to = branch[2] if branch and op[0] in ("BRA", "CALL") and "DIV" not in op else None
            jumps.append((guard or not leaves, jumps_to))
            ops.append(op)
    after = [{i + 1} & {*range(len(ops))} if falls else set() for i, (falls, _) in enumerate(jumps)]
    return ops, [a | {labels[to]} if to else a for a, (_, to) in zip(after, jumps, strict=True)], labels


def longest(after: list[set[int]], entry: int) -> int:
    """Instructions in the longest of the loops that hold no other loop."""
    live, before, loops = walk(entry, after), [set() for _ in after], {}
    for i in live:
        for j in after[i]:
            before[j].add(i)
    for head in live:
        for back in (i for i in before[head] if i >= head):
            body = walk(back, before, {head})  # all that leads to the jump back, as far as its target
            if entry not in body - {head}:  # else it is the way back from a block that was moved to the end
                loops[head] = loops.get(head, set()) | body
    inner = [body for head, body in loops.items() if not any(other in body for other in loops if other != head)]
    return max(map(len, inner), default=0)


def walk(start: int, edges: list[set[int]], seen: set[int] = frozenset()) -> set[int]:
    seen, todo = {*seen}, [start]
    while todo:
        if (i := todo.pop()) not in seen:
            seen.add(i)
            todo += edges[i]
    return seen
