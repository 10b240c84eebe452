# `make help` lists the targets. All but `gpu` make their own environment in .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# One torch thread a worker: two workers on two cores. Each takes one half of the tests in their order, then what is left
# of the other's, so that what a module's tests share is made once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# Collecting all the others imports transformers and TRL, which takes longer than many a test.
INTERPRETED = $$(grep -rl --include='test_*.py' mark.interpreter tests)
# The variable silences the theme's notice of its successor.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

ON_CPU := benchmarks/results/cpu

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-full lint audit aot bench matrix versions docs docs-serve gpu

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

quickstart: .venv/.train ## fine-tune a small model on this machine, from nothing
	$(BIN)/fastpeft quickstart

test: .venv/.dev ## the tests that fit a coffee break; no GPU needed
	@status=0; \
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not full" $(INTERPRETED) || status=$$?; \
	$(PYTEST) -m "not interpreter and not full" || status=$$?; \
	exit $$status

test-full: .venv/.dev ## every test that needs no GPU
	@status=0; \
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter $(INTERPRETED) || status=$$?; \
	$(PYTEST) -m "not interpreter" || status=$$?; \
	exit $$status

lint: .venv/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

STRICT ?= --strict
audit: ## known vulnerabilities of the versions in constraints.txt; asks the package index
	test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit; }
	.venv/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip $(STRICT) --progress-spinner off

aot: .venv/.dev ## compile every kernel for every supported GPU; no GPU needed
	$(BIN)/python -m fastpeft_kernels.aot

bench: .venv/.dev ## benchmarks on this machine's CPU, in ten minutes: records and the pages made of them
	$(BIN)/python -m fastpeft.bench.cpu --rounds 5 --out $(ON_CPU)/steps.jsonl
	rm -f $(ON_CPU)/ops.jsonl
	$(BIN)/fastpeft bench --quick --device cpu --out $(ON_CPU)/ops.jsonl
	$(BIN)/python -m fastpeft.bench.losses --rounds 3 --out $(ON_CPU)/losses.jsonl
	$(BIN)/python -m fastpeft.bench.scaling --rounds 3 --out $(ON_CPU)/scaling.jsonl
	$(BIN)/python -m fastpeft.bench.tables $(ON_CPU)/steps.jsonl --into README.md
	$(BIN)/python -m fastpeft.bench.tables $(ON_CPU)/steps.jsonl --into docs/measured.md
	$(BIN)/python -m fastpeft.bench.tables $(ON_CPU)/losses.jsonl --as losses --into docs/measured.md
	$(BIN)/python -m benchmarks report

matrix: .venv/.dev ## model families x bases x methods x modes beside plain PEFT, within an hour; ARGS="--only llama"
	OMP_NUM_THREADS=1 $(BIN)/python -m fastpeft.bench.matrix $(ARGS)

versions: .venv/.dev ## tests of the seams with old and new transformers, peft, TRL and others; ARGS="--only peft"
	OMP_NUM_THREADS=1 $(BIN)/python -m fastpeft.bench.versions $(ARGS)

docs: .venv/.dev ## build the documentation into site/; a broken link is an error
	$(MKDOCS) build --strict

docs-serve: .venv/.dev ## show the documentation on this machine while it is written
	$(MKDOCS) serve

gpu: ## checks and benchmarks on this machine's GPU, with $(PYTHON) as it is; ARGS="--depth quick"
	PYTHONPATH=.:kernels $(PYTHON) -m fastpeft.bench.gpu $(ARGS)

# The larger environment holds the smaller: installing it marks both.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.train: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -e '.[train]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -e '.[train,bench,dev,docs]'
	@touch .venv/.train $@
