# make demo ARGS='--checkpoint=DIR'   search a schedule (without ARGS: for the shipped checkpoint)
# make quick                          lint and the tests that take under a minute; installs no torch
# make test                           lint, types and the fast tests; make test-slow for those that take minutes,
#                                     make test-mesh for those on eight simulated devices
# make docs                           reference pages out of the docstrings, to site/index.html
# PYTHON=python3.12 picks the interpreter, VENV=DIR the environment, PYTEST_ARGS='-k rope' a part of the tests,
# TEST_EXTRAS=test,tpu-aot installs libtpu too, which compiles for TPUs that are not at hand.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
TEST_EXTRAS ?= test
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

# Config, schedule, params, checkpoint headers, and what the kernels' interfaces refuse; nothing that runs a model.
INDEXER := tests/pallas_kernels/test_indexer_topk.py::test_
SPARSE_MLA := tests/pallas_kernels/test_sparse_mla.py::test_
GROUPED := tests/pallas_kernels/test_grouped_matmul.py::test_
SELECTED := tests/pallas_kernels/test_selected_attention.py::test_
QUICK := \
	tests/test_docs.py \
	tests/indexcache_jax/test_config.py \
	tests/indexcache_jax/test_schedule.py \
	tests/indexcache_jax/test_params.py \
	tests/checkpoints_convert/test_safetensors_io.py \
	tests/checkpoints_convert/test_fp8.py \
	$(addprefix $(INDEXER), wrong_shapes_are_refused named_implementations_say_why_they_cannot_serve) \
	$(addprefix $(INDEXER), key_scales_go_with_eight_bits) \
	$(addprefix $(SPARSE_MLA), wrong_arguments_are_named a_kernel_that_cannot_serve_says_why_and_none_falls_back) \
	$(addprefix $(GROUPED), wrong_shapes_are_named what_cannot_serve_says_why_and_none_falls_back) \
	$(addprefix $(SELECTED), what_does_not_fit_is_named)

# Modules that have a page of their own; a package's page has what it exports, whichever of its files defines it.
REFERENCE := indexcache_jax indexcache_jax.search indexcache_jax.serving indexcache_jax.config indexcache_jax.schedule \
	indexcache_jax.params indexcache_jax.presets indexcache_jax.training indexcache_jax.distill \
	indexcache_jax.indexer_training indexcache_jax.sharding indexcache_jax.memory checkpoints_convert \
	'!checkpoints_convert[.]' pallas_kernels '!pallas_kernels[.]'

.PHONY: demo quick test test-slow test-mesh lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python -m experiments.run $(ARGS)

quick: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n 2 $(QUICK) --deselect tests/test_docs.py::test_the_readmes_python_runs $(PYTEST_ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

test-mesh: $(VENV)/installed-test
	XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
	    $(BIN)/python -m pytest -n 2 tests/mesh $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	JAX_PLATFORMS=cpu $(BIN)/pdoc --docformat google -o site $(REFERENCE)

clean:
	rm -rf .venv .venv312 site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than pyproject.toml once it is installed, so a second make installs nothing.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/pip
	@echo "installing into $(VENV) (a minute or two)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/pip
	@echo "installing with lint and pytest into $(VENV) (a minute or two)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/installed $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/pip
	@echo "installing with the test tools into $(VENV) (a few minutes)"
	@$(PIP_INSTALL) -e '.[$(TEST_EXTRAS)]'
	@touch $(VENV)/installed $(VENV)/installed-dev $@

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/pip
	@echo "installing with pdoc into $(VENV) (a minute or two)"
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $(VENV)/installed $@

$(VENV)/bin/pip:
	@$(PYTHON) -c '' 2>/dev/null || { echo "error: $(PYTHON) not found or does not run; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is %d.%d, but 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) lacks the venv module; install it (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
