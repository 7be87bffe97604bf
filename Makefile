# Everything sets itself up: a target makes the virtual environment it needs, once, with nothing but Python and make.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
FOLDERS := $(wildcard lance_ray tests examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-lowest soak lint fmt docs bench bench-peers clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/ready  ## write, append, read, filter and aggregate a table of this machine's Python code
	$(BIN)/python examples/quickstart.py $(ARGS)

test: .venv/ready  ## the tests that take seconds each
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: .venv/ready  ## all tests, the slow ones too
	$(BIN)/python -m pytest $(ARGS)

test-lowest: .venv-lowest/ready  ## the quick tests on the lowest version of every dependency
	$(LOWEST)/python -m pytest -m "not slow" $(ARGS)

soak: .venv/ready  ## half an hour of all operations under faults, against a model
	$(BIN)/python -m tests.faults.soak $(ARGS)

lint: .venv/ready  ## ruff, mypy, and a reason for every exception to them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(FOLDERS)
	$(BIN)/python tests/check_reasons.py $(FOLDERS)

fmt: .venv/ready  ## format the code and fix what can be fixed without thinking
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: .venv/ready  ## the documentation as a site in build/site, every warning an error
	$(BIN)/python -m mkdocs build --strict $(ARGS)

bench: .venv/ready  ## time reading and writing against plain pylance
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: .venv/ready .venv-peers/lance-ray/ready .venv-peers/daft-lance/ready  ## the same beside the peers from PyPI
	$(BIN)/python -m benchmarks.peers --environments .venv-peers $(ARGS)

clean:  ## remove what make, the tests and the tools made
	rm -rf .venv .venv-lowest .venv-peers .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "setting up .venv, once: a minute or two"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv-lowest/ready: pyproject.toml tests/lowest.py
	@$(PYTHON) tests/lowest.py > /dev/null
	@echo "setting up .venv-lowest, once: a minute or two"
	@$(PYTHON) -m venv --clear .venv-lowest
	@$(PYTHON) tests/lowest.py > .venv-lowest/constraints.txt
	@$(LOWEST)/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt --editable '.[test]'
	@touch $@

# A peer gets the versions of pylance, Ray and Arrow that the project has, as far as it allows them: Daft has its own Arrow.
.venv-peers/%/ready: .venv/ready
	@echo "setting up .venv-peers/$*, once: a minute or two"
	@$(PYTHON) -m venv --clear .venv-peers/$*
	@$(BIN)/python -m pip freeze | grep -E '^(pylance$(if $(filter lance-ray,$*),|ray|pyarrow|numpy|pandas))==' > .venv-peers/$*/constraints.txt
	@.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-peers/$*/constraints.txt $(PEER_$*)
	@touch $@

PEER_lance-ray := lance-ray==0.5.0
PEER_daft-lance := daft-lance==0.6.0 'daft>=0.7.26' pandas
