"""The rules of the house, read from the source by machine. Each rule has a case that trips it."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import ROOT

FILES = {
    str(p.relative_to(ROOT)): p
    for d in ("nanokv", "kernels", "weights", "evals")
    for p in sorted((ROOT / d).rglob("*.py"))
}
FILES |= {p.name: p for p in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
PARTS = [
    name
    for name in FILES
    if name.startswith(("nanokv/policies/", "nanokv/stores/", "nanokv/sharing/")) and not name.endswith("__.py")
]


def imports(tree: ast.AST) -> set[str]:
    """Every module that a file imports anywhere, as a dotted name; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def uses(name: str, *modules: str) -> bool:
    return any(i == m or i.startswith(m + ".") for i in imports(TREES[name]) for m in modules)


# ---- who may import whom ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("kernels/")])
def test_kernels_import_torch_triton_and_the_standard_library(name):
    tops = {i.split(".")[0] for i in imports(TREES[name])}
    assert tops <= {"torch", "triton", "kernels"} | sys.stdlib_module_names


def test_only_the_backends_import_kernels_and_only_two_evals_import_transformers():
    users = [n for n in FILES if uses(n, "kernels") and not n.startswith("kernels/")]
    assert users and all(n.startswith("nanokv/backends/") for n in users), users
    assert [n for n in FILES if uses(n, "transformers")] == ["evals/gpu.py", "evals/peers.py"]
    assert [n for n in FILES if uses(n, "evals") and not n.startswith("evals/") and n != "bench.py"] == []


def test_importing_nanokv_leaves_the_optional_libraries_out():
    lazy = ["triton", "transformers", "sentencepiece", "gguf", "huggingface_hub", "jinja2", "tokenizers"]
    code = f"import sys, nanokv.llm; print([m for m in {lazy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.exhaustive
def test_transformers_still_imports_beside_our_kernels_directory():
    code = "import kernels, transformers; from transformers import LlamaForCausalLM; print(kernels.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "0.0.0", done.stderr[-500:]


BELOW = [n for n in FILES if n.startswith("nanokv/model/")] + ["nanokv/text/tokenizer.py", "nanokv/text/sampler.py"]
ABOVE = ["nanokv.policies", "nanokv.stores", "nanokv.sharing", "nanokv.engine", "nanokv.llm"]
ABOVE += [f"nanokv.cache.{m}" for m in ("plan", "prefill", "decode", "rescore", "kept", "slots")]


@pytest.mark.parametrize("name", BELOW)
def test_the_model_and_the_tokenizer_know_nothing_of_compression(name):
    assert not uses(name, *ABOVE)


def test_the_rule_above_can_fail():
    assert uses("nanokv/engine.py", *ABOVE)


ALLOWED = {
    "nanokv/policies/": ["nanokv.cache.kept", "nanokv.cache.scores", "nanokv.cache.budget", "nanokv.cache.slots"],
    "nanokv/stores/": ["nanokv.cache", "nanokv.policies.base", "nanokv.backends.base"],
    "nanokv/sharing/": [
        "nanokv.backends.base",
        "nanokv.cache.whole",
        "nanokv.files",
        "nanokv.model.config",
        "nanokv.text.tokenizer",
    ],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_method_imports_the_interfaces_and_its_own_folder(name):
    folder = next(f for f in ALLOWED if name.startswith(f))
    allowed = [*ALLOWED[folder], folder.rstrip("/").replace("/", "."), "nanokv.model.rope", "nanokv.model.llama"]
    found = {i for i in imports(TREES[name]) if i.split(".")[0] in ("nanokv", "weights", "evals", "kernels")}
    assert {i for i in found if not any(i == a or i.startswith(a + ".") for a in allowed)} == set()


def graph_of(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """File → files that it imports, anywhere in it: an import inside a function counts too."""
    module = {n.removesuffix(".py").removesuffix("/__init__").replace("/", "."): n for n in trees}
    return {n: {module[i] for i in imports(tree) if i in module} - {n} for n, tree in trees.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing. A package that gathers its own parts is no circle."""
    done: set[str] = set()

    def visit(n: str, path: tuple[str, ...]) -> list[str]:
        if n in path:
            return [*path[path.index(n) :], n]
        if n in done:
            return []
        for m in sorted(graph[n]):
            if not m.endswith("__init__.py") and (found := visit(m, (*path, n))):
                return found
        done.add(n)
        return []

    return next((found for n in graph if (found := visit(n, ()))), [])


def test_there_are_no_import_cycles_not_even_late_ones():
    graph = graph_of(TREES)
    assert len(graph["nanokv/engine.py"]) >= 5  # the reading above found something
    assert cycle(graph) == []


def test_a_late_import_that_closes_a_circle_is_found():
    trees = {"a.py": ast.parse("import b"), "b.py": ast.parse("def f():\n    from a import x")}
    assert cycle(graph_of(trees)) == ["a.py", "b.py", "a.py"]


def test_the_page_to_read_is_short():
    assert len(FILES["nanokv/cache/protocol.py"].read_text(encoding="utf-8").splitlines()) <= 150


# ---- the model knows `attend` -----------------------------------------------------------------------------------------


def test_the_model_knows_attend_and_nothing_else():
    from nanokv.cache.plan import AXES

    name = "nanokv/model/llama.py"
    source = FILES[name].read_text(encoding="utf-8")
    names = [n for parts in AXES.values() for n in parts]
    assert not [n for n in names if re.search(rf"\b{n}\b", source, re.IGNORECASE)]
    calls = [n.func for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)]
    assert not [c.id for c in calls if isinstance(c, ast.Name) and c.id in ("isinstance", "hasattr", "getattr")]
    assert sum(1 for c in calls if isinstance(c, ast.Attribute) and c.attr == "attend") == 1


# ---- parts declare, nobody sniffs -------------------------------------------------------------------------------------


def sniffs(tree: ast.AST) -> list[str]:
    """Comparisons of a type with `is`, and of a backend's name."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [ast.unparse(x) for x in (node.left, *node.comparators)]
        is_type = any(re.match(r"type\(", s) for s in sides) and any(
            isinstance(o, ast.Is | ast.IsNot) for o in node.ops
        )
        if is_type or any(s.endswith("ops.name") for s in sides):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("nanokv/")])
def test_nobody_sniffs_at_types_overridden_methods_or_names(name):
    assert sniffs(TREES[name]) == []


@pytest.mark.parametrize(
    "code",
    ["type(policy).slot is Policy.slot", "type(store) is not Dense", "ctx.ops.name != 'triton'", "ops.name == 'sdpa'"],
)
def test_sniffing_is_found(code):
    assert sniffs(ast.parse(f"x = {code}"))


def collisions(part: object, base: type) -> set[str]:
    """Keys that the user gives, with the name of something that the base class declares."""
    return {f.name for f in fields(part)} & {n for n in dir(base) if not n.startswith("_")}


def test_no_key_overrides_what_a_part_declares():
    from nanokv.cache.protocol import StoreSpec
    from nanokv.policies import POLICIES
    from nanokv.policies.base import Policy
    from nanokv.stores import STORES

    assert {n: c for n, p in POLICIES.items() if (c := collisions(p, Policy))} == {}
    assert {n: c for n, p in STORES.items() if (c := collisions(p, StoreSpec))} == {}


def test_a_key_that_overrides_a_declaration_is_found():
    from dataclasses import dataclass

    from nanokv.policies.base import Policy

    @dataclass(frozen=True, kw_only=True)
    class Careless(Policy):
        protected_sinks: int = 4

        def keep(self, p):
            raise AssertionError("never called")

    assert collisions(Careless(), Policy) == {"protected_sinks"}


def test_eviction_says_what_heads_do():
    """A policy that ranks slots evicts by score; one that evicts by score ranks them, or has the scores of steps."""
    from nanokv.policies import POLICIES
    from nanokv.policies.base import Policy

    for name, policy in POLICIES.items():
        ranks = type(policy).slot_scores.__qualname__ != Policy.slot_scores.__qualname__
        by_score = policy.eviction == "score"
        assert by_score if ranks else not by_score or policy.decode_request, name


# ---- a decode step ----------------------------------------------------------------------------------------------------


def waits(function: ast.FunctionDef) -> list[str]:
    """Calls in a function that copy a value from the device to the host."""
    methods, builtins = ("item", "tolist", "cpu", "nonzero", "numpy"), ("int", "bool", "float")
    calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
    found = [c.attr for c in calls if isinstance(c, ast.Attribute) and c.attr in methods]
    return found + [c.id for c in calls if isinstance(c, ast.Name) and c.id in builtins]


STEP = {
    "nanokv/cache/slots.py": [
        "next_slots",
        "take_lowest",
        "flat_index",
        "take",
        "record",
        "record_at",
        "record_masked",
        "next_slot_on_host",
    ],
    "nanokv/cache/decode.py": ["attend", "read", "_read_by_chunk", "_sink_queries"],
    "nanokv/cache/rescore.py": ["push"],
    "nanokv/stores/dense.py": [
        "append",
        "append_by_index",
        "_write",
        "write_at",
        "append_masked",
        "read",
        "read_parts",
        "read_by_chunk",
        "_read_span",
        "join",
    ],
    "nanokv/stores/ragged.py": ["append", "read", "_attend"],
    "nanokv/stores/shared.py": ["append", "read"],
    "nanokv/stores/quant/grouped.py": [
        "append",
        "record",
        "take",
        "_evict",
        "slot_of",
        "read",
        "_held",
        "_exact",
        "_attend",
    ],
    "nanokv/stores/quant/mixed.py": ["append", "read"],
    "nanokv/stores/quant/gear.py": ["attend", "decode"],
    "nanokv/stores/quant/kvquant.py": ["encode", "decode"],
    "nanokv/stores/quant/coupled.py": ["encode", "decode"],
    "nanokv/stores/quant/minicache.py": ["append", "decode", "write_at"],
    "nanokv/stores/sparse/chunks.py": [
        "append",
        "read",
        "_read_best",
        "choose",
        "_visible",
        "assign_buffer",
        "_attend",
    ],
    "nanokv/stores/sparse/shadow.py": ["score", "gather"],
    "nanokv/stores/sparse/quest.py": ["score", "gather"],
    "nanokv/stores/host/offload.py": ["prefetch", "staged", "wait", "append", "_planes_to_read", "read"],
}
STEP |= {n: ["update_scores", "slot_scores", "shift"] for n in FILES if n.startswith("nanokv/policies/")}


@pytest.mark.parametrize("name", STEP)
def test_a_decode_step_never_asks_the_device(name):
    functions = {f.name: f for f in ast.walk(TREES[name]) if isinstance(f, ast.FunctionDef)}
    if not name.startswith("nanokv/policies/"):
        assert set(STEP[name]) <= set(functions)
    found = {n: waits(functions[n]) for n in STEP[name] if n in functions}
    assert {n: w for n, w in found.items() if w} == {}


def test_a_step_that_asks_the_device_is_found():
    assert waits(ast.parse("def read(self):\n    return int(self.length.max().item())").body[0]) == ["item", "int"]


def test_no_property_has_a_setter():
    """torch 2.11 calls setters behind a compiled graph, where a recorded step would miss them."""
    found = [
        n for n, tree in TREES.items() for x in ast.walk(tree) if isinstance(x, ast.Attribute) and x.attr == "setter"
    ]
    assert found == []


# ---- state, names, sources --------------------------------------------------------------------------------------------


def test_there_is_no_global_state():
    registries = {"POLICIES", "STORES", "SHARES", "PRESETS", "MODELS", "AXES", "BACKENDS", "__all__"}
    for name, tree in TREES.items():
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Global)], name
        for node in tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and isinstance(node.value, ast.List | ast.Set):
                assert target.id in registries or target.id.isupper(), f"{name}: {target.id}"
    readers = [n for n in FILES if re.search(r"\b(environ|getenv)\b", FILES[n].read_text(encoding="utf-8"))]
    assert readers == ["weights/registry.py"]
    functions = [f for f in ast.walk(TREES["weights/registry.py"]) if isinstance(f, ast.FunctionDef)]
    assert sum("environ" in ast.unparse(f) for f in functions) == 1


def test_no_file_is_called_utils_and_no_function_takes_any_keyword():
    assert not [n for n in FILES if "utils" in n]
    for name, tree in TREES.items():
        if name.startswith(("nanokv/", "kernels/")):
            assert not [f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.args.kwarg], name


def test_every_method_is_a_frozen_dataclass_with_a_source():
    from nanokv.cache.plan import AXES

    for parts in AXES.values():
        for name, part in parts.items():
            assert type(part).__dataclass_params__.frozen, name
            assert "arXiv:" in type(part).__doc__ or "no paper" in type(part).__doc__, name


def test_every_kernel_has_a_twin_of_the_same_signature():
    import kernels
    from kernels import reference

    for name in kernels.__all__:
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(reference, name)), name


def test_nothing_depends_on_the_workplace():
    for name, path in FILES.items():
        assert "../shared" not in path.read_text(encoding="utf-8"), name
