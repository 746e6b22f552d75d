# Start here: `make demo` and `make test` set up what they need (.venv, from requirements/cpu.txt) by themselves.
# ARGS="key=value ..." goes to the run of `make demo`, PYTEST="..." to pytest.
SHELL := /bin/sh
PYTHON_IN := .venv/bin/python
ARGS ?=
PYTEST ?=

.PHONY: help setup demo test check lint format lock clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup:  ## install the pinned packages into .venv (the others do it by themselves)
	@sh requirements/install.sh

demo: setup  ## train the embedded default on this machine; ends with the report's path
	@$(PYTHON_IN) -m tools.warm_start models/tiny-reasoner
	@$(PYTHON_IN) -m tools.launch --config configs/demo.yaml $(ARGS)

test: setup  ## the whole CPU test suite, real engines included (minutes)
	@$(PYTHON_IN) -m pytest -m "not gpu" $(PYTEST)

check: lint  ## linters, types, import rules and the fast tests, in under a minute
	@$(PYTHON_IN) -m pytest -q -m "not gpu and not e2e and not slow" tests/unit tests/properties tests/golden tests/integration/test_service.py $(PYTEST)

lint: setup  ## linters, types and import rules alone
	@$(PYTHON_IN) -m ruff check .
	@$(PYTHON_IN) -m ruff format --check .
	@.venv/bin/basedpyright
	@.venv/bin/lint-imports

format: setup  ## rewrite the code in the house style
	@$(PYTHON_IN) -m ruff check --fix .
	@$(PYTHON_IN) -m ruff format .

lock: setup  ## pin anew what pyproject.toml asks for, into requirements/cpu.txt
	@{ sed -n '1p' requirements/cpu.txt; \
	   UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(echo "$$PIP_FIND_LINKS" | tr ' ' ',')}" .venv/bin/uv pip compile pyproject.toml \
	     --extra cpu --extra dev --python-version 3.11 --no-header --no-annotate --quiet; } > requirements/cpu.new
	@mv requirements/cpu.new requirements/cpu.txt

clean:  ## remove caches (not .venv, models or runs)
	@rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
