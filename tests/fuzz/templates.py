"""Random chat templates, among them ones that loop, recurse, or ask for huge texts."""

from __future__ import annotations

import random

CONVERSATION = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
HOSTILE = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{{ 'a' * 10**9 }}",
    "{{ ('a' * 10**8).replace('a', 'bb') }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.center(10**9) | length }}",
    "{{ [1] * 10**9 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ (2 ** 10**7) }}",
    "{{ ('a' * 30000) | wordwrap(1) | indent(100000) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "{{ range(10**9) | list }}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ ['a' * 10**6] * 99999 | map('upper') | map('length') | sum }}",
    "{{ (['a' * 10**6] * 99999) | map('upper') | map('length') | sum }}",
    "{{ (['a' * 10**6] * 99999) | join }}",
    "{{ (['a' * 10**6] * 99999) | tojson }}",
    "{{ ('<>' * 10**6) | striptags }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}{{ x }}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ lipsum(n=100000) }}",
    "{% for a in []|slice(10**12) if false %}{% endfor %}",
    "{{ ([0] * 10**7) | select('odd') | list | length }}",
    "{% set a=[1] %}{% set b=[1] %}" + "{% set a=[a,a] %}{% set b=[b,b] %}" * 33 + "{{ a == b }}",
    "{{ (('f' * 4000000) | int(0, 16)) // (('f' * 2000000) | int(0, 16)) == 1 }}",
    "{{ ('a' * 10**6) | trim('bcdefghijklmnopqrstuvwxyz' * 40000 + 'a') | length }}",
    "{{f(g(1),x[0],a=1)|e}}" * 11000,
    "{{ cycler.__init__.__globals__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages[0].content.__class__ }}",
    "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ raise_exception('no\nnewlines') }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ strftime_now(1) }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{{ 'ab' | batch(1) | list }}",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "{{ " + "-" * 5000 + "1 }}",
)
ATOMS = (
    "messages", "bos_token", "messages[0].content", "m.role", "'x'", "7", "none", "add_generation_prompt", "tools", "10**9",
    "range(3)", "namespace(a=1)", "messages | length", "messages | tojson", "'a' * 1000", "[1, 2]", "{'a': 1}", "undefined_thing",
)  # fmt: skip
FILTERS = (
    "trim", "length", "tojson", "upper", "list", "first", "last", "join", "replace('a', 'b')", "indent(4)", "int", "string", "sort",
    "reverse", "default('x')", "items", "wordcount", "batch(2)", "random", "center(80)", "filesizeformat", "pprint", "xmlattr",
    "urlize", "striptags", "truncate(5)",
)  # fmt: skip
OPERATORS = "+", "*", "~", "==", "-", "%", "//", "**", "in"
ACCESS = "strip()", "split()", "content", "items()", "format(1)", "upper", "__class__", "append(1)"


def draw_template(dice: random.Random) -> str:
    if dice.random() < 0.25:
        return dice.choice(HOSTILE)
    return "".join(_statement(dice, 0) for _ in range(dice.choice((1, 2, 3))))


def _expression(dice: random.Random, depth: int) -> str:
    kind = dice.randrange(6 if depth < 3 else 1)
    if kind <= 1:
        return dice.choice(ATOMS)
    if kind == 2:
        return f"{_expression(dice, depth + 1)} | {dice.choice(FILTERS)}"
    if kind == 3:
        return f"({_expression(dice, depth + 1)} {dice.choice(OPERATORS)} {_expression(dice, depth + 1)})"
    if kind == 4:
        return f"{_expression(dice, depth + 1)}[{dice.choice(('0', '-1', '::-1', '1:', repr('a')))}]"
    return f"{_expression(dice, depth + 1)}.{dice.choice(ACCESS)}"


def _statement(dice: random.Random, depth: int) -> str:
    kind = dice.randrange(6 if depth < 3 else 2)
    if kind <= 1:
        return "{{ " + _expression(dice, 0) + " }}"
    inner = "".join(_statement(dice, depth + 1) for _ in range(dice.choice((1, 2))))
    value = _expression(dice, 1)
    if kind == 2:
        return "{% for m in " + dice.choice(("messages", "range(1000)", value)) + " %}" + inner + "{% endfor %}"
    if kind == 3:
        return "{% if " + value + " %}" + inner + "{% else %}x{% endif %}"
    if kind == 4:
        return "{% set x = " + value + " %}" + inner
    return "{% macro f(m) %}" + inner + "{% endmacro %}{{ f(" + value + ") }}"
