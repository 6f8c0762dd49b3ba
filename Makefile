# make demo ARGS='--checkpoint=DIR'   search a schedule (without ARGS: for the shipped checkpoint)
# make test                           lint, types and the fast tests; make test-slow for the rest
# PYTHON=python3.12 picks the interpreter, VENV=DIR the environment, PYTEST_ARGS='-k rope' a part of the tests,
# TEST_EXTRAS=test,tpu-aot installs libtpu too, which compiles for TPUs that are not at hand.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
TEST_EXTRAS ?= test
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

.PHONY: demo test test-slow lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python -m experiments.run $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv312 .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than pyproject.toml once it is installed, so a second make installs nothing.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/pip
	@echo "installing into $(VENV) (a minute or two)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/pip
	@echo "installing with the test tools into $(VENV) (a few minutes)"
	@$(PIP_INSTALL) -e '.[$(TEST_EXTRAS)]'
	@touch $(VENV)/installed $@

$(VENV)/bin/pip:
	@$(PYTHON) -c '' 2>/dev/null || { echo "error: $(PYTHON) not found or does not run; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is %d.%d, but 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) lacks the venv module; install it (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
