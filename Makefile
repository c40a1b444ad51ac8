# Every command starts from a bare clone with python3 (3.10 or newer, with venv) and make, and may be repeated.
PYTHON ?= python3
PY := .venv/bin/python
# what runs in a minute: rules of the house, pages, plans, what every policy must have, one file of each other kind
QUICK := tests/test_architecture.py tests/policies/test_policies.py tests/policies/test_interfaces.py tests/cache/test_plan.py \
	tests/model/test_sampler.py tests/io/test_loader.py tests/stores/test_codecs.py tests/evals/test_docs.py \
	tests/policies/test_identity.py::test_every_policy_has_examples_of_its_own \
	tests/policies/test_identity.py::test_tokens_that_must_stay_fit_the_smallest_budget \
	tests/cli/test_cli.py::test_every_option_of_every_part_has_a_meaning

.PHONY: demo check test fuzz gpu lint clean
SHELL := /bin/sh

demo: .venv/run
	@$(PY) -m evals.tasks --tokens 3000 --seed 3 > .venv/demo.txt
	@echo "A text of about 3,000 tokens that names a code somewhere, and ends with:"; tail -n 1 .venv/demo.txt; echo
	@echo "(the code is $$($(PY) -m evals.tasks --tokens 3000 --seed 3 --answer))"; echo
	@echo "== continued with the full cache:"
	@$(PY) generate.py --prompt-file .venv/demo.txt -n 12
	@echo; echo "== with a quarter of it (snapkv):"
	@$(PY) generate.py --prompt-file .venv/demo.txt -n 12 --policy snapkv:budget=25%,window=8,kernel=13,pool=max

check: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q -n 2 -m "not slow and not pairs and not commands" $(QUICK)

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q -n 2 --dist worksteal

# damaged files of each kind and random plans, as many as you like
CASES ?= 1000
fuzz: .venv/dev
	$(PY) -m pytest -q -s tests/fuzz --cases $(CASES)

# on a machine with CUDA
gpu:
	python -m pytest tests/gpu -q -n 8 --dist worksteal --maxfail=30
	python -m evals.gpu --json gpu.json --stages ceilings check steps default prefill plain batches attention peers

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
