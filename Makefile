# Every target makes the environment it needs: .venv, about 80 s and 1.5 GB the first time.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test check fix docs bench clean

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
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

# The exact torch on the command line makes pip take its small CPU build.
$(STAMP): pyproject.toml constraints.txt
	@echo "making $(VENV): about 80 s and 1.5 GB the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq -c constraints.txt $(TORCH) -e '.[dev]'
	@touch $@

install: $(STAMP)  ## make the environment in .venv

demo: $(STAMP)  ## fine-tune a small diffusion model on the CPU and measure it (ARGS="key=value ...")
	@rm -rf outputs/demo
	@$(RUN) bash recipes/train_tiny_sft.sh checkpoint_save_dir=outputs/demo $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k word")
	@$(RUN) python -m pytest $(ARGS)

check: $(STAMP)  ## lint, formatting, types, layers, generated docs; offline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python scripts/cli_docs.py --check

fix: $(STAMP)  ## repair lint and formatting
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/cli.md and docs/recipes.md again
	$(BIN)/python scripts/cli_docs.py

bench: $(STAMP)  ## run every benchmark; each prints a ratio
	@$(RUN); set -e; for file in $(wildcard benchmarks/*.py); do echo "== $$file"; python "$$file"; done

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
