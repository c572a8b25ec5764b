# `make demo` and `make test` need python3 (3.10 or newer) and make, nothing else: both install into $(VENV) first.
# Every target works from any folder with  make -C PATH TARGET.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.admth-installed

# PyTorch's threads wait for each other by spinning, which costs minutes where another program wants the processors.
CALM := OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE}

export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-gpu bench bench-int8 bench-scale lint format clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## make the environment and install everything into it

demo: $(INSTALLED)  ## train, export, prove, encode, search and report on real images, in about four minutes
	@$(CALM) $(BIN)/python examples/demo.py

test: lint  ## lint, type-check and run the whole test suite
	$(CALM) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(INSTALLED)  ## test engines on an NVIDIA GPU and write docs/gpu-results.md; skipped with the reason without one
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench: $(INSTALLED)  ## measure the figures of docs/benchmarks.md
	$(BIN)/python benchmarks/run.py

bench-int8: $(INSTALLED)  ## compare INT8 models with other tools' and write docs/int8.md; hours, see ARGS=--help
	@$(CALM) PYTHONPATH=benchmarks $(BIN)/python -W ignore -m int8 $(ARGS)

bench-scale: $(INSTALLED)  ## measure encoding and search at scale, into docs/scale.md
	$(BIN)/python benchmarks/scale.py

lint: $(INSTALLED)  ## ruff check, ruff format --check and mypy --strict
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environment, caches and build results; runs/ stays
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is done again, and it is older than the two files
# after they change. A broken or half-made environment is made anew; a working one is kept and brought up to date.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is missing or older than Python 3.10: run  make PYTHON=/path/to/python3.10 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "make: $(PYTHON) has no venv module: install it (on Debian and Ubuntu the package python3-venv), or run  make PYTHON=/path/to/another/python3 $(MAKECMDGOALS)" >&2; exit 1; }; \
	  echo "making the environment $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing admth and its tools into $(VENV): the first time this takes some minutes"
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable '.[dev]'
	@touch $@
