"""The README says only what is true: its files exist, its methods are the registered ones, its figures lie in results/."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from nanokv.plan import AXES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_method_has_a_row():
    for parts in AXES.values():
        for name in parts:
            assert re.search(rf"^\| `{name}`", README, re.MULTILINE), name
    rows = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    assert rows == {name for parts in AXES.values() for name in parts}


def test_every_file_it_names_exists():
    named = set(re.findall(r"\b((?:nanokv|kernels|weights|evals|tests|results)/[\w/.-]*\w)", README))
    missing = [
        n
        for n in named
        if not (ROOT / n).exists() and not n.startswith("weights/smollm2") and not n.startswith("weights/NAME")
    ]
    assert not missing


@pytest.mark.parametrize("line", re.findall(r"^python generate.py (.*)$", README, re.MULTILINE))
def test_every_command_has_flags_that_exist(line):
    import shlex

    import generate

    argv = shlex.split(line.split(" #")[0].split(" > ")[0])
    assert generate.parser().parse_args(argv)


def test_every_measured_figure_lies_in_results():
    import json

    found = " ".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "results").glob("*.json")))
    numbers = {f"{float(x):.2f}" for x in re.findall(r"-?\d+\.\d+", found)} | {
        f"{float(x):.1f}" for x in re.findall(r"-?\d+\.\d+", found)
    }
    table = README.split("## Measured")[1].split("\n## ")[0]
    quoted = re.findall(r"\| *(\d+\.\d+)x? *(?=\|)", table)
    assert quoted and not [q for q in quoted if q not in numbers]
    assert all(json.loads(p.read_text())["command"] in README for p in (ROOT / "results").glob("*.json"))
