PYTHON ?= python3
BIN := .venv/bin
# Python keeps the compiled package, so that the hundreds of processes of the tests start sooner.
unexport PYTHONDONTWRITEBYTECODE
# One more than cores: a test that waits for a process or a server leaves its core to another.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1) + 1)')
PYTEST = TMPDIR=$(shell .ci/scratch) $(BIN)/python -m pytest

.PHONY: setup demo test test-slow test-services test-servers test-slurm test-long tracking-server lint docs bench gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and what else is needed: a few minutes, about 6 GB"
	@# Python compiles what is imported; to compile all of torch takes a minute.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m sddlskd.train -cd sweeps -cn demo home=demo
	$(BIN)/python -m analysis demo --home demo --out demo/results
	@echo
	@cat demo/results/tables/overview_digits.md
	@echo
	@echo "Next:"
	@echo "  open demo/results/report.html                                       # tables, figures, every run"
	@echo "  $(BIN)/mlflow ui --backend-store-uri sqlite:///demo/mlflow.db       # shows the runs on http://127.0.0.1:5000"
	@echo "  $(BIN)/python -m sddlskd.train -cd sweeps -cn demo home=demo sweep.name=demo seed=\"range(0,5)\" # five seeds; finished runs are kept"
	@echo "  $(BIN)/python -m sddlskd.train --help                                # lists the options"

test: setup
	$(PYTEST) --numprocesses $(WORKERS) --dist worksteal --durations 12

# The slow tests: ranks, killed sweeps, every method in one group, the documentation's examples.
test-slow: setup
	$(PYTEST) -m slow --numprocesses 3 --dist worksteal --durations 12

# Tests against real services (SLURM, PostgreSQL, ...) on loopback. Tests whose services cannot be
# installed are skipped, with the reason.
test-services: test-servers test-slurm

test-servers: setup
	.ci/install slurm-wlm slurmdbd munge mariadb-server postgresql || true
	$(PYTEST) -m services tests/services --durations 12

test-slurm: setup
	.ci/install slurm-wlm slurmdbd munge || true
	$(PYTEST) -m services tests/slurm --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 12

# Hundreds of kills at random moments: about ten minutes. Nothing runs it by itself.
test-long: setup
	$(PYTEST) -m long --durations 12

# MLflow on PostgreSQL on loopback, with its data in tracking-server/ (docs/tracking.md).
tracking-server: setup
	$(BIN)/python -m sddlskd.server

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site in build/site; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html; its search needs a server: $(BIN)/python -m http.server -d build/site"

bench: setup
	$(BIN)/python -m tests.benchmarks

# Checks and measurements on one GPU (docs/measurements); DEVICE=cpu runs the checks without one.
DEVICE ?= cuda
gpu: setup
	$(BIN)/python -m tests.gpu --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--only right) $(if $(OUT),--out $(OUT))

clean:
	rm -rf .venv demo build *.egg-info
