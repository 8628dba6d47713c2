PYTHON ?= python3
BIN := .venv/bin
# Python keeps the compiled package, so that the hundreds of processes of the tests start sooner.
unexport PYTHONDONTWRITEBYTECODE
# One more than cores: a test that waits for a process or a server leaves its core to another.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1) + 1)')
PYTEST = TMPDIR=$(shell .ci/scratch) $(BIN)/python -m pytest

# `make` without a target lists the targets. The texts behind ## are those of CONTRIBUTING.md.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-services test-servers test-slurm test-long tracking-server lint docs bench gpu clean

help:
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed ## creates .venv with everything that the others need

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and what else is needed: a few minutes, about 6 GB"
	@# Python compiles what is imported; to compile all of torch takes a minute.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	touch $@

demo: setup ## trains the demo and shows its table (3 to 5 minutes on two cores)
	$(BIN)/python -m sddlskd.train -cd sweeps -cn demo home=demo
	$(BIN)/python -m analysis demo --home demo --out demo/results
	@echo "Next:"
	@echo "  open demo/results/report.html                                       # tables, figures, every run"
	@echo "  $(BIN)/mlflow ui --backend-store-uri sqlite:///demo/mlflow.db       # shows the runs on http://127.0.0.1:5000"
	@echo "  $(BIN)/python -m sddlskd.train -cd sweeps -cn demo home=demo sweep.name=demo sweep.seeds=until_decided  # adds seeds to what is undecided: 5 to 10 minutes"
	@echo "  $(BIN)/python -m sddlskd.train --help                                # lists the options"

test: setup ## runs the quick tests (8 to 12 minutes on two cores)
	$(PYTEST) --numprocesses $(WORKERS) --dist worksteal --durations 12

test-slow: setup ## runs the tests with several processes, killed sweeps, every method in one group, the documentation's examples (ten minutes)
	$(PYTEST) -m slow --numprocesses 3 --dist worksteal --durations 12

# Tests against real services (SLURM, PostgreSQL, ...) on loopback. Tests whose services cannot be
# installed are skipped, with the reason.
test-services: test-servers test-slurm ## as root on Debian: runs the tests with real SLURM, PostgreSQL and MLflow servers on loopback

test-servers: setup
	.ci/install slurm-wlm slurmdbd munge mariadb-server postgresql || true
	$(PYTEST) -m services tests/services --durations 12

test-slurm: setup
	.ci/install slurm-wlm slurmdbd munge || true
	$(PYTEST) -m services tests/slurm --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 12

# Nothing runs it by itself.
test-long: setup ## kills runs hundreds of times at random moments (about ten minutes)
	$(PYTEST) -m long --durations 12

# Its data are in tracking-server/ (docs/tracking.md).
tracking-server: setup ## runs MLflow on PostgreSQL on this machine
	$(BIN)/python -m sddlskd.server

lint: setup ## runs ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning is an error.
docs: setup ## builds the documentation into build/site, strictly and without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html; its search needs a server: $(BIN)/python -m http.server -d build/site"

bench: setup ## measures ratios side by side in one run; nothing judges them
	$(BIN)/python -m tests.benchmarks

# DEVICE=cpu runs the checks without a GPU.
DEVICE ?= cuda
gpu: setup ## checks and measures on one NVIDIA GPU: docs/measurements
	$(BIN)/python -m tests.gpu --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--only right) $(if $(OUT),--out $(OUT))

clean: ## removes .venv, demo and build
	rm -rf .venv demo build *.egg-info
