# Every target makes the environment it needs: .venv, about 90 s and 2.7 GB the first time.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all test-page test-gpu test-newest test-oldest lock check fix docs docs-serve notebook package bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
# For what calls `unmask` or `python` by name.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
# Without this pyright asks the network at each run whether it is the newest.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

# What each environment holds: the lock, the newest that pyproject.toml allows, its lower bounds.
.venv/.installed: LIMITS := cat constraints.txt
.venv/.installed: constraints.txt
.venv-newest/.installed: LIMITS := echo $(TORCH)
.venv-oldest/.installed: LIMITS := $(PYTHON) scripts/lowest.py
.venv-oldest/.installed: scripts/lowest.py

# The exact torch on the command line makes pip take its small CPU build. The variables reach the build
# of the package (hatchling) too: the first in pip before 25.3, the second from there on.
.venv/.installed .venv-newest/.installed .venv-oldest/.installed: pyproject.toml
	@echo "making $(@D): about 90 s and 2.7 GB the first time"
	@$(PYTHON) -m venv --clear $(@D)
	@$(LIMITS) > $(@D)/limits.txt
	@PIP_CONSTRAINT=$(@D)/limits.txt PIP_BUILD_CONSTRAINT=$(@D)/limits.txt $(@D)/bin/pip install $(TORCH) -e '.[dev,docs]' \
		> $(@D)/pip.log 2>&1 || { tail -n 20 $(@D)/pip.log; exit 1; }
	@touch $@

install: $(STAMP)  ## make the environment in .venv, with the versions of constraints.txt

lock:  ## write constraints.txt again: the newest versions that pyproject.toml allows
	@rm -rf .venv-newest
	@$(MAKE) --no-print-directory .venv-newest/.installed
	@{ sed '/^torch==/q' constraints.txt; .venv-newest/bin/pip freeze --all --exclude-editable \
		--exclude pip --exclude torch; } > .venv-newest/lock.txt
	@mv .venv-newest/lock.txt constraints.txt

demo: $(STAMP)  ## fine-tune a small diffusion model on the CPU and measure it (ARGS="key=value ...")
	@rm -rf outputs/demo
	@$(RUN) bash recipes/train_tiny_sft.sh checkpoint_save_dir=outputs/demo $(ARGS)

# One worker process a core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 8 --dist worksteal
test: MARK := not slow
test-slow: MARK := slow
test: $(STAMP)  ## run the tests that are not slow, on all cores (ARGS="-k word")
test-slow: $(STAMP)  ## the slow ones: several processes, or more than 5 s
test-all: $(STAMP)  ## all of them
test test-slow test-all:
	@$(RUN) $(PYTEST) -m "$(MARK)" $(ARGS)

test-page: $(STAMP)  ## the playground in headless Chromium (SCREENSHOTS=folder); skipped without a browser
	@$(BIN)/pip install -q playwright
	@$(RUN) python -m pytest -rs tests/test_playground.py $(ARGS)

test-gpu: $(STAMP)  ## the ones that need a GPU; they are skipped where there is none
	@$(RUN) python -m pytest -rs tests/test_gpu.py $(ARGS) || [ $$? -eq 5 ]  # 5 = all skipped

test-newest: .venv-newest/.installed  ## all tests with the newest versions that pyproject.toml allows
test-oldest: .venv-oldest/.installed  ## all tests with the lowest versions that pyproject.toml allows
test-newest test-oldest: test-%:
	@.venv-$*/bin/pip freeze --exclude-editable | paste -sd' ' | fold -sw 100
	@$(MAKE) --no-print-directory test-all VENV=.venv-$*

notebook: $(STAMP)  ## execute examples/tour.ipynb and write it again with its outputs (under a minute)
	@$(RUN) python scripts/notebook.py examples/tour.ipynb

package:  ## build wheel and sdist into dist/, check them, try the wheel alone in an empty environment; needs an index
	@$(PYTHON) scripts/package.py

check: $(STAMP)  ## lint, formatting, types, layers, generated docs; offline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python scripts/cli_docs.py --check

fix: $(STAMP)  ## repair lint and formatting
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

# Material announces at each run that it will not support mkdocs 2, which pyproject.toml excludes.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)  ## write docs/cli.md and docs/recipes.md again, and build the site into site/; offline
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/mkdocs build --strict

docs-serve: $(STAMP)  ## show the site at http://127.0.0.1:8000, built again at each change of docs/
	$(BIN)/mkdocs serve --strict


bench: $(STAMP)  ## run every benchmark; each prints a ratio
	@$(RUN); set -e; for file in $(wildcard benchmarks/*.py); do echo "== $$file"; python "$$file"; done

clean:  ## remove the environment, caches and runs
	rm -rf .venv .venv-newest .venv-oldest outputs site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
