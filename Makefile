# Needs only make and Python 3.11 or newer. Everything is installed into .venv, at the versions of constraints.txt.
#   make demo ARGS="--steps 500"      make test ARGS="-k plots -x"      make test PYTHON=python3.12
# A Linux machine without a GPU saves gigabytes with PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU builds.

BIN := .venv/bin
ARGS ?=
REV ?= HEAD
PYTHON ?=

# Read from the environment rather than given by -c, because only so do the pins reach the isolated build as well;
# which of the two variables does that depends on the age of pip.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
QUIET := -m pip --disable-pip-version-check --no-input -qq
PIP := $(BIN)/python $(QUIET)
ECOSYSTEM := .venv-ecosystem

.PHONY: help demo quick test lint same docs release ecosystem clean
.DEFAULT_GOAL := help

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed-test  ## Scan a small model, train another three ways, find a threshold; results go to demo/.
	@$(BIN)/smoothdiag demo --out demo $(ARGS)

# One thread for each process, since they share the cores.
quick: .venv/.installed-test  ## Run the tests to run while typing, in under a minute: no processes, no frameworks.
	@OMP_NUM_THREADS=1 $(PYTEST) -m 'not slow and not gpu and not thorough' $(ARGS)

test: .venv/.installed-test  ## Run the tests, one process for each core up to four.
	@$(PYTEST) $(ARGS)

lint: .venv/.installed-dev  ## Run the linter, the format check and the strict type check, of the package and of its users.
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@.ci/typed $(BIN)

same: .venv/.installed-test  ## Compare seeded runs with those of another commit, bit for bit: make same REV=HEAD~1.
	@$(BIN)/python benchmarks/same/compare.py $(REV) $(ARGS)

# Built anew each time: a build does not know that what the notebook prints has changed.
docs: .venv/.installed-docs  ## Build the site into docs/_build/html, and run the notebook in it.
	@rm -rf docs/_build
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

release: .venv/.installed-dev  ## Build and check the wheel, install it alone into an empty environment and run the demo there.
	@.ci/release $(BIN) $(ARGS)

# One process: Ray starts workers of its own, and the trainers keep settings in the environment of the process.
ecosystem: $(ECOSYSTEM)/.installed  ## Run the recipes of docs/ecosystem.md beside their libraries, in some four minutes.
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(ECOSYSTEM)/bin/python -m pytest -n 0 -m slow tests/ecosystem $(ARGS)

clean:  ## Remove the environments, the caches and the results of the demo.
	rm -rf .venv $(ECOSYSTEM) .pytest_cache .mypy_cache .ruff_cache dist demo docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make an unchanged environment cost nothing. `dev` and `docs` contain `test`, so they refresh its stamp.
.venv/.installed-test: pyproject.toml constraints.txt | .venv/.created
	@echo "Installing smoothdiag into .venv (a few minutes the first time)"
	@$(PIP) install torch
	@$(PIP) install -e '.[test]'
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/.created
	@echo "Installing smoothdiag and its developer tools into .venv (a few minutes the first time)"
	@$(PIP) install torch
	@$(PIP) install -e '.[dev]'
	@touch .venv/.installed-test $@

.venv/.installed-docs: pyproject.toml constraints.txt | .venv/.created
	@echo "Installing smoothdiag and what builds its site into .venv (a few minutes the first time)"
	@$(PIP) install torch
	@$(PIP) install -e '.[docs]'
	@touch .venv/.installed-test $@

# PyPI's torchvision loads only beside PyPI's torch. One that does not load keeps transformers from loading as well.
$(ECOSYSTEM)/.installed: pyproject.toml constraints.txt | .venv/.created
	@echo "Installing smoothdiag and the libraries of docs/ecosystem.md into $(ECOSYSTEM) (a few minutes)"
	@$(BIN)/python -m venv $(ECOSYSTEM)
	@$(ECOSYSTEM)/bin/python $(QUIET) install torch
	@$(ECOSYSTEM)/bin/python $(QUIET) install -e '.[ecosystem]'
	@$(ECOSYSTEM)/bin/python -c 'import torchvision' 2>/dev/null || { \
		echo "torchvision does not fit this build of torch, so timm, which needs it, is not tested" >&2; \
		$(ECOSYSTEM)/bin/python $(QUIET) uninstall -y torchvision timm; }
	@touch $@

.venv/.created:
	@for python in $(PYTHON) python3.11 python3; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			$(BIN)/python -m pip --version >/dev/null 2>&1 || $$python -m venv .venv || exit; \
			touch $@; exit; \
		fi; \
	done; \
	echo "smoothdiag needs Python 3.11 or newer, as python3.11 or python3 on PATH, or: make PYTHON=/path/to/python" >&2; \
	exit 1
