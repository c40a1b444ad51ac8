"""The six rules of the design, read from the source by machine."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = {
    str(p.relative_to(ROOT)): p
    for d in ("nanokv", "kernels", "weights", "evals")
    for p in sorted((ROOT / d).rglob("*.py"))
}
FILES |= {p.name: p for p in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
PARTS = [
    n
    for n in FILES
    if n.startswith(("nanokv/policies/", "nanokv/stores/", "nanokv/shares/", "nanokv/places/"))
    and not n.endswith("__init__.py")
]


def imports(name: str) -> set[str]:
    """Every module a file imports anywhere, as a dotted name."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def uses(name: str, *modules: str) -> bool:
    return any(i == m or i.startswith(m + ".") for i in imports(name) for m in modules)


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("kernels/")])
def test_kernels_import_torch_triton_and_the_standard_library(name):
    tops = {i.split(".")[0] for i in imports(name)}
    assert tops <= {"torch", "triton", "kernels"} | sys.stdlib_module_names


def test_only_ops_imports_kernels_and_only_evals_peers_transformers():
    assert [n for n in FILES if uses(n, "kernels") and not n.startswith("kernels/")] == ["nanokv/ops.py"]
    assert [n for n in FILES if uses(n, "transformers") and n != "evals/peers.py"] == []
    assert [n for n in FILES if uses(n, "evals") and not n.startswith("evals/") and n != "bench.py"] == []


def test_importing_nanokv_leaves_the_optional_libraries_out():
    lazy = ["triton", "transformers", "sentencepiece", "gguf", "huggingface_hub", "jinja2", "tokenizers"]
    code = f"import sys, nanokv; print([m for m in {lazy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_transformers_still_imports_beside_our_kernels_directory():
    code = "import kernels, transformers; from transformers import LlamaForCausalLM; print(kernels.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "0.0.0", done.stderr[-500:]


BELOW = ["model", "rope", "config", "loader", "tokenizer", "sampler"]


@pytest.mark.parametrize("name", BELOW)
def test_what_the_model_needs_knows_nothing_of_compression(name):
    above = [f"nanokv.{m}" for m in ("policies", "stores", "prompt", "cache", "plan", "engine")]
    assert not uses(f"nanokv/{name}.py", *above)


def test_the_model_knows_attend_and_nothing_else():
    from nanokv.cache.plan import AXES

    source = FILES["nanokv/model.py"].read_text(encoding="utf-8")
    names = [n for parts in AXES.values() for n in parts]
    assert not [n for n in names if re.search(rf"\b{n}\b", source, re.IGNORECASE)]
    calls = [n.func for n in ast.walk(TREES["nanokv/model.py"]) if isinstance(n, ast.Call)]
    assert not [c.id for c in calls if isinstance(c, ast.Name) and c.id in ("isinstance", "hasattr", "getattr")]
    assert sum(1 for c in calls if isinstance(c, ast.Attribute) and c.attr == "attend") == 1


@pytest.mark.parametrize("name", PARTS)
def test_a_method_imports_the_contract_and_its_siblings(name):
    folder = name.rsplit("/", 1)[0].replace("/", ".")
    allowed = (
        "nanokv.contract",
        "nanokv.slots",
        folder,
        "abc",
        "collections",
        "torch",
        "dataclasses",
        "math",
        "re",
        "typing",
        "__future__",
    )
    allowed += ("nanokv.ops",) if "stores" in name else ()
    allowed += ("nanokv.stores",) if "places" in name else ()  # a place moves a store's slots
    assert all(any(i == a or i.startswith(a + ".") for a in allowed) for i in imports(name))


def test_the_contract_imports_nothing_of_nanokvs_when_it_runs():
    assert not uses("nanokv/contract.py", "kernels", "weights")
    code = "import sys; sys.modules['nanokv'] = type(sys)('nanokv'); sys.modules['nanokv'].__path__ = ['nanokv'];"
    code += "import nanokv.contract; print([m for m in sys.modules if m.startswith('nanokv.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['nanokv.contract']"


def test_there_are_no_cycles():
    """Of imports at the top of a file; one inside a function, made on use, closes no circle."""
    module = {n.removesuffix(".py").removesuffix("/__init__").replace("/", "."): n for n in FILES}
    graph = {n: set() for n in FILES}
    for n in FILES:
        for node in TREES[n].body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{a.name}" for a in node.names]
                graph[n] |= {module.get(name, module.get(node.module)) for name in names} - {None}
    done: set[str] = set()

    def visit(n: str, path: tuple[str, ...]) -> None:
        assert n not in path, " → ".join((*path, n))
        if n not in done:
            for m in graph[n]:
                visit(m, (*path, n))
            done.add(n)

    for n in FILES:
        visit(n, ())
    assert len(graph["nanokv/engine.py"]) >= 5  # the reading above found something


HOT = {
    "append",
    "_write",
    "take",
    "add",
    "read",
    "parts",
    "_part",
    "_exact",
    "put",
    "_encode",
    "_held",
    "place_of",
    "encode",
    "decode",
    "turn",
    "back",
    "host_ring",
    "place_at",
    "_count",
    "attend",
    "answer",
    "slot",
    "watch",
    "ring",
    "place",
    "flat",
    "choose",
    "_there",
    "_best",
    "fill",
    "_attend",
    "come",
    "stage",
}


def hot_functions():
    for name in FILES:
        if name.startswith("nanokv/") and name != "nanokv/prompt.py":
            for node in ast.walk(TREES[name]):
                if isinstance(node, ast.FunctionDef) and node.name in HOT:
                    yield name, node


def test_the_decode_step_never_waits_for_the_device():
    for name, function in hot_functions():
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in ("item", "tolist", "cpu", "nonzero", "numpy", "int", "bool", "float_"), (
                    f"{name}: {function.name}"
                )
            assert not isinstance(node, ast.Assert), f"{name}: {function.name}"


def test_there_is_no_global_state():
    registries = {"POLICIES", "STORES", "SHARES", "PLACES", "PRESETS", "MODELS", "AXES", "BACKENDS", "__all__"}
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
