# Aliases for commands that also work without make.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
RUN ?= runs
EXPERIMENT ?=
QUICK ?=
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup sweep train evaluate report reproduce reproduce-list bench bench-peers tensorboard test test-all test-lowest mutants lint types docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: .venv/.installed  ## create .venv and install the package in it

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

sweep: setup  ## beta x latent size on the embedded digits, with a report (a minute or two)
	$(BIN)/python -m vae.train experiment=digits_sweep $(ARGS)

train: setup  ## one run; ARGS="data=mnist objective.beta=4"
	$(BIN)/python -m vae.train $(ARGS)

evaluate: setup  ## measure a finished run again; RUN=folder
	$(BIN)/python -m vae.evaluate run='$(RUN)' $(ARGS)

report: setup  ## write a sweep's report; RUN=folder
	$(BIN)/python -m vae.report '$(RUN)'

reproduce: setup  ## rerun a paper's experiment, with a verdict per claim; EXPERIMENT=name (or all) [QUICK=1] [JOBS=2]
	$(BIN)/python -m vae.reproduce $(EXPERIMENT) $(if $(QUICK),--quick) --jobs $(JOBS) $(ARGS)

reproduce-list: setup  ## all experiments, with their last verdicts and cost
	$(BIN)/python -m vae.reproduce --list

bench: setup  ## speed against a bare PyTorch loop, a sweep, how cost grows; on an idle machine, about a quarter of an hour
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-peers: setup  ## the same for pythae and an ordinary Lightning set-up; installs pythae in an environment of its own
	$(BIN)/python benchmarks/peers.py $(ARGS)

tensorboard: setup  ## open what was logged, on localhost; RUN=folder (default: all)
	$(BIN)/tensorboard --logdir '$(RUN)' --host 127.0.0.1

test: setup lint types  ## what CI runs: lint, types, then the everyday tests (three to six minutes on two cores)
	$(BIN)/python -m pytest -n auto --dist worksteal

mutants: setup  ## plant each fault of tests/faults.json in a copy and see it caught (half an hour)
	$(BIN)/python tests/mutants.py $(ARGS)

test-all: setup lint types  ## the same with all tests, slow ones included
	$(BIN)/python -m pytest -m 'slow or not slow'

test-lowest:  ## the everyday tests with the lowest versions that pyproject.toml allows, in .venv-lowest (3 GB to download)
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -n auto --dist worksteal

lint: setup  ## ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup  ## mypy over vae/
	$(BIN)/mypy

docs: setup  ## the pages of docs/ with the API as one site, build/site; dead links fail
	$(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf .venv .venv-lowest .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
