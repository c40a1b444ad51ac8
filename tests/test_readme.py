"""The README says only what is true: its files exist, its methods are the registered ones, its figures lie in results/."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from evals import readme
from nanokv.cache.plan import AXES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_method_has_a_row():
    for parts in AXES.values():
        for name in parts:
            assert re.search(rf"^\| (?:`\w+` )*`{name}`", README, re.MULTILINE), name
    first = re.findall(r"^\| ([`\w ]+) \| (?:keep|store|share|place) \|", README, re.MULTILINE)
    rows = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    assert rows == {name for parts in AXES.values() for name in parts}


def test_every_file_it_names_exists():
    named = set(re.findall(r"\b((?:nanokv|kernels|weights|evals|tests|results)/[\w/.-]*\w)", README))
    missing = [
        n
        for n in named
        if not (ROOT / n).exists()
        and not n.startswith(("weights/smollm2", "weights/NAME", "weights/maps"))  # made when used
    ]
    assert not missing


@pytest.mark.parametrize("line", re.findall(r"^python generate.py (.*)$", README, re.MULTILINE))
def test_every_command_has_flags_that_exist(line):
    import shlex

    import generate

    argv = shlex.split(line.split(" #")[0].split(" > ")[0])
    assert generate.parser().parse_args(argv)


@pytest.mark.parametrize("table", readme.TABLES, ids=lambda t: t.__name__)
def test_every_measured_table_is_made_from_results(table):
    made = table()
    assert made.count("\n") >= 4 and made in README, (
        f"run python -m evals.readme and put {table.__name__} into the README"
    )


def test_every_result_says_how_it_was_made():
    import json

    files = sorted((ROOT / "results").glob("*.json"))
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert {"command", "commit", "machine", "torch", "model", "dtype"} <= set(found) and found["commit"], file.name
        assert found["command"].split(" --plans")[0] in README and file.name in found["command"], file.name
    assert len(files) >= 3


def test_every_figure_in_the_text_under_measured_is_in_a_table_or_a_result():
    """What the sentences quote: percentages, factors and sizes must stand in one of the tables beside them."""
    section = README.split("## Measured")[1].split("\n## ")[0]
    tables = "\n".join(x for x in section.splitlines() if x.startswith("|"))
    prose = "\n".join(x for x in section.splitlines() if not x.startswith("|"))
    quoted = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?(?:%|x| MiB))", prose)
    assert quoted and not [q for q in quoted if q not in tables and q not in ALLOWED]


ALLOWED = {"10%", "25%", "50%"}  # budgets
