# Everything a developer runs. `.venv` is made on the way; ARGS is passed on: make test ARGS="-k environ -x"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# In how many processes the tests run, which wait about as long as they compute; 0 is this one, as a debugger wants it.
JOBS ?= 3

# Hundreds of processes import bridge in a run of the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test coverage fuzz table lint format bench release-check clean

help:
	@echo "make demo    a Flask app on an ASGI server, a FastAPI app on a WSGI server (ARGS=--check: drive them and end)"
	@echo "make test    the tests (JOBS=0: in one process)"
	@echo "make coverage  the tests, slower, and which branches of bridge/ they have not taken"
	@echo "make fuzz    examples for the translations that a fuzzer makes (ARGS=-max_total_time=1200: for twenty minutes)"
	@echo "make table   the tests on real servers; what works on what goes into README.md"
	@echo "make lint    formatting, lint and types"
	@echo "make format  write the formatting, and the lint fixes that are safe"
	@echo "make bench   bridge and its peers, side by side"
	@echo "make release-check  all that has to hold before a release: wheel, sdist, metadata, README, the tests on the wheel"
	@echo "make clean   remove what was made, .venv too"

demo: $(VENV)/.demo
	$(BIN)/python -m bridge $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(COVERAGE) $(ARGS)

coverage: COVERAGE := --cov --cov-report=term-missing:skip-covered
coverage: test

fuzz: $(VENV)/.test $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz $(ARGS)

table: $(VENV)/.test $(VENV)/.servers
	$(BIN)/python -m tests.table $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict bridge tests
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing_of_apps.py
	@# Of a package that is installed, as users have it: an editable one has no types to verify.
	rm -rf $(VENV)/typed && mkdir $(VENV)/typed && cp -R bridge $(VENV)/typed
	PYTHONPATH=$(CURDIR)/$(VENV)/typed $(BIN)/pyright --pythonpath $(BIN)/python --verifytypes bridge --ignoreexternal > $(VENV)/typed/report \
		|| { cat $(VENV)/typed/report; false; }

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

# The release, in this order: the version in bridge/__init__.py and CHANGELOG.md, make release-check, a commit, its tag,
# and what lies in $(DIST) then. The tests run on the installed wheel, away from bridge/, on what the sdist brings.
# Before the first one: the repository's address, in [project.urls] and before the README's relative links and images. A
# package index shows the README alone, and has the plot's alt text only.
DIST := $(VENV)/dist
RELEASE := $(VENV)/release

release-check: $(VENV)/.dev
	rm -rf $(DIST) $(RELEASE)
	$(BIN)/python -m build --outdir $(DIST) .
	$(BIN)/python -m twine check --strict $(DIST)/*
	$(BIN)/python -m readme_renderer README.md -o $(DIST)/README.html
	$(BIN)/python -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls $(DIST)/*.whl)[test]"
	mkdir $(RELEASE)/tree
	tar -xzf $(DIST)/*.tar.gz -C $(RELEASE)/tree --strip-components 1
	rm -r $(RELEASE)/tree/bridge
	cd $(RELEASE)/tree && ../bin/python -c 'import bridge, sys; print(bridge.__file__); sys.exit("site-packages" not in bridge.__file__)'
	cd $(RELEASE)/tree && ../bin/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

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
