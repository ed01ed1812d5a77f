# Every target does its own set-up: a virtual environment inside the checkout, made anew when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FILE_SYSTEM := $(addprefix tests/,bad_input fs mapped model multiproc places trees)

.PHONY: help demo test test-policies test-slow check format lint types stress bench figures docs clean
help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/: .*##/\t/' | expand -t 14

$(STAMP): pyproject.toml setup.py $(wildcard daxemu/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[plot,dev]"
	@touch $@

demo: $(STAMP)   ## the main job on real input: clones mapped by many processes, memory measured
	$(BIN)/onecopy demo

test: $(STAMP)   ## the default tests (under 10 minutes on two cores)
	$(BIN)/pytest -n 2 -m "not slow"

test-policies: $(STAMP)  ## all tests of the file system on pools behind a cache, by both policies
	for policy in shared per-inode; do $(BIN)/pytest -m "not slow" --policy $$policy $(FILE_SYSTEM) || exit; done

test-slow: $(STAMP)  ## the long ones: a million extents, 2^20 references, every kill point
	$(BIN)/pytest -m slow

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy -p onecopy

check: format lint types test  ## format, lint, types, tests

stress: $(STAMP)  ## processes that store, clone and are killed on the same files, with and without a cache: twenty minutes, a row of seeds
	for seed in 1 2 3 4 5 6 7 8 9 10; do \
		for how in "" "--kill" "--kill --policy shared --cache-size 4M" "--kill --policy per-inode --cache-size 4M"; do \
		$(BIN)/onecopy stress --processes 8 --seconds 30 --seed $$seed $$how || exit; done; done

bench: $(STAMP)  ## every figure of the benchmarks, side by side
	$(BIN)/onecopy bench

figures: $(STAMP) ## measure (NAMES="copies reads", or all) and write docs/benchmarks.md; wants a quiet machine
	for name in $${NAMES:-$$($(BIN)/onecopy bench --list | cut -d' ' -f1)}; do echo "$$name"; \
		$(BIN)/onecopy bench "$$name" --json > $(VENV)/figures.json || exit; \
		$(BIN)/python -m onecopy.benchmarks.document $(VENV)/figures.json || exit; done

docs: $(STAMP)   ## write FORMAT.md, CONCURRENCY.md and docs/benchmarks.md anew from tables and figures
	$(BIN)/python -m onecopy.fs.document
	$(BIN)/python -m onecopy.benchmarks.document

clean:           ## forget the environment and what was built
	rm -rf $(VENV) build dist src/*.egg-info daxemu/*.so
