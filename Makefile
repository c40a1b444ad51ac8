# Both commands start from a bare clone with python3 (3.10 or newer, with venv) and make; both may be repeated.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint clean
SHELL := /bin/sh

demo: .venv/run
	@$(PY) -m evals.tasks --tokens 3000 --seed 1 > .venv/demo.txt
	@echo "== the full cache"
	@$(PY) generate.py --chat --prompt-file .venv/demo.txt -n 48
	@echo "== the same with a quarter of it: snapkv"
	@$(PY) generate.py --chat --prompt-file .venv/demo.txt -n 48 --policy snapkv:budget=25%,window=8,kernel=13,pool=max

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q

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
