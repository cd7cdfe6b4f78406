# Every target makes its own .venv and installs what it needs; a stamp per set of extras says what is in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two pips at work in one environment break it
.PHONY: help demo test test-fast lint format typecheck wheel clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo ## the main job on the digits data set, start to end
	$(BIN)/cgmq-fx demo

test: $(VENV)/.stamp-test ## every test, on all cores
	$(BIN)/pytest -q -n auto --dist worksteal --durations=10

test-fast: $(VENV)/.stamp-test ## the tests without the slow mark
	$(BIN)/pytest -q -n auto --dist worksteal -m "not slow"

lint: $(VENV)/.stamp-dev ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.stamp-dev ## ruff: sort imports, fix what can be fixed, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.stamp-dev ## mypy strict on the three packages
	$(BIN)/mypy

wheel: $(VENV)/.stamp-dev ## build the wheel into dist/ and try it in a clean environment
	$(BIN)/python .ci/check_wheel.py dist

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "cgmq_fx needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	       "Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-%: $(PINS) | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[$*]'
	@touch $@
