# Every target works on a fresh clone: the first one that needs it makes .venv with all tools in it.
# ARGS goes to the tool that runs, for example: make test ARGS="tests/layouts -k stencil"

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; \
	done)
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Material for MkDocs announces its successor on every build.
export NO_MKDOCS_2_WARNING = 1

.DEFAULT_GOAL := help
.PHONY: help demo sparsify test crosses laws mutants recipes fuzz bench results kernels lint types contracts docs check format clean

help:
	@echo 'make demo       train a Vision Big Bird and a dense ViT on handwritten digits (runs/demo)'
	@echo 'make sparsify   train a dense teacher on the digits and make it sparse (runs/teacher, runs/sparse)'
	@echo 'make test       run all tests'
	@echo 'make crosses    run all combinations of what make test meets in pairs'
	@echo 'make laws       hold every primitive and backend to every law, 200 cases each'
	@echo 'make mutants    try every law on every mutant and write docs/tables/mutants.md'
	@echo 'make recipes    run every recipe on every backend, compiled, exported, and at four image sizes'
	@echo 'make fuzz       random and broken input to everything, for minutes (see docs/fuzzing.md)'
	@echo "make bench      attnkit beside dense attention and the papers' own formulations, in five to six minutes (runs/bench)"
	@echo 'make results    measure everything that docs/benchmarks.md shows, and renew that page (commit both)'
	@echo 'make kernels    compile all Triton kernels for four classes of GPUs without one, and write docs/kernels.md'
	@echo 'make check      lint, types, contracts, docs and tests'
	@echo 'make lint       ruff: rules and format'
	@echo 'make types      pyright on both packages'
	@echo 'make contracts  import-linter: imports run one way'
	@echo 'make docs       build the site into site/, strictly'
	@echo 'make format     let ruff fix and format everything'
	@echo 'make clean      remove .venv, caches, site/ and dist/ (runs/ stays)'

$(READY): pyproject.toml
	@test -n '$(PYTHON)' || { echo 'attnkit needs Python 3.10 or newer with venv and pip; set PYTHON=/path/to/python'; exit 1; }
	@echo 'Setting up .venv with $(PYTHON): PyTorch is large, so the first time takes a few minutes.'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --progress-bar off --editable '.[dev,docs,train]'
	@touch $@

demo: $(READY)
	@$(BIN)/attnkit train --model bigbird_vit_micro --baseline vit_micro --out runs/demo --overwrite $(ARGS)

sparsify: $(READY)
	@$(BIN)/attnkit train --model sparsifiner_micro --set 'mix.groups=[{kind: dense, heads: 3}]' --out runs/teacher --overwrite
	@$(BIN)/attnkit train --recipe sparsifiner --teacher runs/teacher --out runs/sparse --overwrite $(ARGS)

# One thread a worker: as many workers as cores, each with its own threads, would fight over the cores. Slow tests come
# first (tests/conftest.py), and a worker that has done its part takes from another's.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

crosses: $(READY)
	@ATTNKIT_CROSSES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		tests/kernels/triton/test_interpreted.py $(ARGS)

laws: $(READY)
	@ATTNKIT_LAWS_EXAMPLES=200 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/laws $(ARGS)

mutants: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(ARGS)

recipes: $(READY)
	@ATTNKIT_RECIPES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/models/test_matrix.py $(ARGS)

fuzz: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --processes $(WORKERS) $(ARGS)

bench: $(READY)
	@$(BIN)/attnkit bench --out runs/bench $(ARGS)

results: $(READY)
	@$(BIN)/attnkit bench all $(ARGS)
	@$(BIN)/python docs/generate/benchmarks.py

# Where a torch without CUDA brought no Triton, it is installed: compiling needs no GPU.
kernels: $(READY)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --progress-bar off --editable '.[triton]'
	@OMP_NUM_THREADS=1 $(BIN)/python docs/generate/kernels.py --processes $(WORKERS) $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo 'make format would change files'; exit 1; }

types: $(READY)
	@$(BIN)/pyright --pythonpath $(BIN)/python

contracts: $(READY)
	@$(BIN)/lint-imports

docs: $(READY)
	@$(BIN)/mkdocs build --strict --quiet

check: lint types contracts docs test

format: $(READY)
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .

clean:
	rm -rf .venv site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
