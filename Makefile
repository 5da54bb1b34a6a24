# Everything a newcomer needs, on any machine with Python 3.11 or newer: `make quickstart`, `make test`.

PYTHON ?= python3
VENV   ?= .venv
# What pip is asked for first; other arguments of pip may follow, for example the index of another build:
#   make install TORCH="torch==2.13.0 --index-url <where the CPU builds are>"
TORCH  ?= torch==2.13.0

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := "$(BIN)/python" -m pip install -q --disable-pip-version-check
# One thread a process: tests start several ranks, and results do not depend on the number of cores.
TEST  := OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-gpu lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' "$(firstword $(MAKEFILE_LIST))"

install: $(STAMP) ## create .venv with everything that the other targets need (once)

$(STAMP): setup.py constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make install PYTHON=...")'
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch "$(STAMP)"

quickstart: install ## train a student from two teachers on this machine, in minutes, and report
	rm -rf runs/quickstart
	"$(BIN)/megatron-opd" train examples/quickstart.yaml
	"$(BIN)/megatron-opd" eval examples/quickstart.yaml  # the export, read back by transformers
	"$(BIN)/megatron-opd" report runs/quickstart

test: install ## fast tests
	$(TEST) -m "not slow and not gpu"

test-all: install ## every test that needs no GPU
	$(TEST) -m "not gpu"

test-gpu: install ## tests that need a GPU
	$(TEST) -m gpu

lint: install ## style, shell scripts, types of the leaf modules, generated documentation
	"$(BIN)/ruff" check .
	"$(BIN)/shellcheck" .ci/run $(wildcard tools/*.sh slurm/*.sh)
	"$(BIN)/mypy"
	"$(BIN)/python" tools/config_docs.py --check

clean: ## remove the environment and caches; runs stay
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
