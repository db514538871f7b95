# Each target makes .venv and installs what it needs where that is missing. `make` alone lists the targets.

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint bench docs completions constraints clean

# The first interpreter that is new enough; another: make PYTHON=/path/to/python test
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3 python; do \
	$$candidate -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$candidate && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' || { \
		echo "llmcli needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing llmcli and what it needs into $(VENV) (once)"
	@$(PIP) install --constraint constraints.txt --editable '.[data,plot]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing llmcli and what its tests need into $(VENV) (once)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(RUNTIME)

quickstart: $(RUNTIME)  ## Plain text to a model that writes, in minutes
	$(BIN)/llmcli quickstart

test: lint  ## ruff, mypy and the default tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: lint  ## The slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu'

lint: $(DEV)  ## ruff and mypy alone
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(DEV)  ## Run every script of benchmarks/, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(DEV)  ## Write docs/commands.md from the commands
	$(BIN)/python docs/generate.py

completions: $(RUNTIME)  ## Write the completion scripts of bash, zsh and fish
	@mkdir -p completions
	$(BIN)/llmcli completion bash > completions/llmcli.bash
	$(BIN)/llmcli completion zsh > completions/_llmcli
	$(BIN)/llmcli completion fish > completions/llmcli.fish

constraints: $(DEV)  ## Pin the set that .venv holds (after the tests passed with it)
	@sed -n '/^#/p' constraints.txt > constraints.tmp
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >> constraints.tmp
	mv constraints.tmp constraints.txt

clean:  ## Remove what the targets made, .venv included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
