# Two commands do everything on a fresh Debian or Ubuntu: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: all demo test test-all check lint coverage bench clean peers

all: $(VENV)/.run

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test,dev]'
	touch $@

demo: $(VENV)/.run
	$(BIN)/python -m liveblockd.demo

test: $(VENV)/.dev
	$(PYTEST) -n 2 -m 'not slow'

test-all: $(VENV)/.dev
	$(PYTEST) -n 2

check: lint coverage

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(VENV)/.dev
	$(BIN)/coverage run -m pytest -m 'not slow'
	$(BIN)/coverage report --skip-covered

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
