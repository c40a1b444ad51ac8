# Both commands start from a bare clone with python3 (3.10 or newer, with venv) and make; both may be repeated.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint clean
SHELL := /bin/sh

demo: .venv/run
	@$(PY) -m evals.tasks --tokens 3000 --seed 3 > .venv/demo.txt
	@echo "A text of about 3,000 tokens that names a code somewhere, and ends with:"; tail -n 1 .venv/demo.txt; echo
	@echo "== continued with the full cache:"
	@$(PY) generate.py --prompt-file .venv/demo.txt -n 12
	@echo; echo "== with a quarter of it (snapkv):"
	@$(PY) generate.py --prompt-file .venv/demo.txt -n 12 --policy snapkv:budget=25%,window=8,kernel=13,pool=max

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q -n 2

lint: .venv/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "nanokv needs Python 3.10 or newer; set PYTHON=..."; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv
