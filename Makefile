# Everything a developer runs. `.venv` is made on the way; ARGS is passed on: make test ARGS="-k environ -x"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help demo test lint format bench clean

help:
	@echo "make demo    a Flask app on an ASGI server, a FastAPI app on a WSGI server (ARGS=--check: drive them and end)"
	@echo "make test    the tests, with branch coverage of bridge/"
	@echo "make lint    formatting, lint and types"
	@echo "make format  write the formatting, and the lint fixes that are safe"
	@echo "make bench   bridge and its peers, side by side"
	@echo "make clean   remove what was made, .venv too"

demo: $(VENV)/.demo
	$(BIN)/python -m bridge $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict bridge tests
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra: a newcomer's `make demo` need not wait for a type checker, and nothing is
# installed again before pyproject.toml changes. `bridge` itself is installed editable.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "Installing bridge[$*] into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"bridge needs Python 3.11 or newer, $(PYTHON) is {sys.version}")'
	@$(PYTHON) -m venv $(VENV)
