"""The pages say only what is true: files and links exist, methods are the registered ones, tables are made from results/."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from evals import tables
from nanokv.cache.plan import AXES

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in tables.PAGES}
ALL = "\n".join(PAGES.values())


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_part_has_one_row():
    rows = re.findall(
        r"^\| ((?:`\w+` ?)+)\| (keep|store|share) \|", PAGES["docs/methods.md"] + PAGES["docs/stores.md"], re.M
    )
    named = [(axis, name) for cell, axis in rows for name in re.findall(r"`(\w+)`", cell)]
    axes = zip(("keep", "store", "share"), AXES.values(), strict=True)
    registered = [(axis, name) for axis, parts in axes for name in parts]
    assert not set(registered) - set(named), "these have no row in docs/methods.md or docs/stores.md"
    assert not set(named) - set(registered), "these rows name nothing that is registered"
    assert len(named) == len(set(named)), "a part has two rows"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_exists(page):
    text, folder = PAGES[page], (ROOT / page).parent
    links = [x.split("#")[0] for x in re.findall(r"\]\(([^)]+)\)", text) if not x.startswith("http")]
    named = set(
        re.findall(r"(?<![\w/])((?:nanokv|kernels|evals|tests|docs)/[\w/-]*\w\.\w+|results/\w[\w-]*/[\w.-]+\w)", text)
    )
    missing = [x for x in links if not (folder / x).exists()] + [x for x in named if not (ROOT / x).exists()]
    assert not missing


def fenced(text: str, language: str) -> list[str]:
    """The blocks between fences of this language; "" for a fence that names none."""
    return [body for found, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if found == language]


def commands() -> list[str]:
    """Every line of a plain block that a user would type, without its comment."""
    lines = "\n".join(block for page in PAGES.values() for block in fenced(page, "")).splitlines()
    return sorted({x.split(" #")[0].strip() for x in lines if re.match(r"(python|make) ", x)})


# commands that take more than a minute, or need what a test has not, and why
LONG = {
    "make ": "installs",
    "python bench.py": "measures for minutes",
    "--model llama": "fetches a large model",
    "max-autotune": "tries many kernels",
    "max_autotune": "tries many kernels",
    "pytest": "the tests themselves",
}


@pytest.mark.commands
@pytest.mark.parametrize("line", [x for x in commands() if not any(part in x for part in LONG)])
def test_every_command_runs(line, tmp_path):
    argv = shlex.split(line)
    done = subprocess.run(
        [sys.executable, *argv[1:]], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_every_long_command_is_on_a_page():
    assert len(commands()) > 20 and all(any(part in x for x in commands()) for part in LONG if part != "pytest")


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^python generate.py (.*)$", ALL, re.M))))
def test_every_command_has_flags_that_exist(line):
    import generate

    assert generate.parser().parse_args(shlex.split(line.split(" #")[0].split(" > ")[0]))


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^python bench.py (.*)$", ALL, re.M))))
def test_every_measurement_has_flags_that_exist(line):
    import bench

    assert bench.parser().parse_args(shlex.split(line.split(" #")[0]))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_what_its_source_gives(page):
    assert tables.refreshed(PAGES[page]) == PAGES[page], "run python -m evals.tables"


def test_every_table_stands_on_a_page():
    used = re.findall(r"<!-- table: (.+?) -->", ALL)
    assert sorted(used) == sorted(tables.TABLES)


@pytest.mark.parametrize(
    "page", ["docs/adding.md", "docs/compile.md", pytest.param("README.md", marks=pytest.mark.commands)]
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """In order, in one namespace, as a module that dataclasses can look up."""
    import importlib.util

    blocks = fenced(PAGES[page], "python")
    monkeypatch.chdir(ROOT)
    file = tmp_path / "page.py"
    file.write_text("\n".join(b.replace("from __future__ import annotations\n", "") for b in blocks), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("page", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "page", module)
    spec.loader.exec_module(module)
    assert blocks


def test_a_block_with_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="no table is called 'nothing'"):
        tables.refreshed("<!-- table: nothing -->\n<!-- end -->")


def test_a_changed_block_is_seen():
    page = PAGES["docs/benchmarks.md"].replace("| `full` |", "| `fool` |", 1)
    assert tables.refreshed(page) == PAGES["docs/benchmarks.md"]


def test_every_result_says_how_it_was_made():
    files = sorted((ROOT / "results").glob("*/*.json"))
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert {"command", "commit", "machine", "torch", "model", "dtype"} <= set(found) and found["commit"], file.name
        assert found["command"].split(" --plans")[0] in ALL, f"no page quotes {file.name}"
    assert len(files) >= 3


def test_every_figure_in_the_text_is_in_a_table_of_its_page():
    """Percentages, factors and sizes that sentences quote stand in a table beside them."""
    text = PAGES["docs/benchmarks.md"].split("## Quality")[1]
    rows = "\n".join(x for x in text.splitlines() if x.startswith("|"))
    prose = "\n".join(x for x in text.splitlines() if not x.startswith("|"))
    quoted = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?(?:%|x| MiB))", prose)
    assert quoted and not [q for q in quoted if q not in rows and q not in ALLOWED]


ALLOWED = {"10%", "25%", "50%"} | {
    "0.7x",
    "0.9x",
}  # budgets; llama.cpp at its best, which the text says has no file here
