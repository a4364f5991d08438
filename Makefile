# One command from a fresh clone: `make test` or `make run` builds .venv first, and again only when setup.cfg changes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS =
GIN_FILE = configs/runs/quickstart.gin
OUTPUT_DIR = out/quickstart

# With libtpu installed and no TPU, JAX tries to start one and prints errors: without an accelerator it is told to use the
# CPU, as it is for the tests. Set JAX_PLATFORMS to choose another device, or to nothing for JAX's own choice.
ACCELERATORS := $(wildcard /dev/accel* /dev/vfio/[0-9]* /dev/nvidia[0-9]*)
ifeq ($(ACCELERATORS),)
export JAX_PLATFORMS ?= cpu
endif
test: export JAX_PLATFORMS ?= cpu

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed-test
LINT_INSTALLED := $(VENV)/.installed-lint
DOCS_INSTALLED := $(VENV)/.installed-docs
# Present while an install runs, so that the next make knows one was cut short.
INSTALLING := $(VENV)/.installing

# A virtual environment whose interpreter has gone, or whose install was cut short, is stale whatever its stamps say.
STALE := $(shell test -x $(VENV_PYTHON) -a ! -e $(INSTALLING) || echo stale)

# The interpreter goes first: a removal that is cut short must not leave something that looks whole.
REMOVE_VENV = rm -f $(VENV_PYTHON) && rm -rf $(VENV)

.PHONY: help run test test-all lint docs figures clean stale

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

run: $(INSTALLED) ## Run the quickstart; GIN_FILE=, OUTPUT_DIR= and ARGS="--flag=value ..." change it
	$(VENV_PYTHON) -m experiments.evaluate --gin_file=$(GIN_FILE) --output_dir=$(OUTPUT_DIR) $(ARGS)

PYTEST = $(VENV_PYTHON) -m pytest -n auto --maxprocesses=4

test: $(INSTALLED) ## Run the tests that are not slow; ARGS="tests/test_layers.py -k name ..." goes to pytest
	$(PYTEST) $(ARGS)

test-all: $(INSTALLED) ## Run all tests: every method with every check, mesh, generation and shape, and real models
	$(PYTEST) -m "" $(ARGS)

lint: $(LINT_INSTALLED) ## Check the style of the sources with flake8
	$(VENV_PYTHON) -m flake8 $(ARGS)

docs: $(DOCS_INSTALLED) ## Build the documentation into out/docs; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build $(ARGS)

figures: $(INSTALLED) ## Run what README and docs mark as figures, and put in what is printed; ARGS="half fixed" selects
	$(VENV_PYTHON) -m experiments.figures $(ARGS)

clean: ## Remove the virtual environment, build output and caches; results in out/ stay
	$(REMOVE_VENV)
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
	find kvjax pallas_kernels models experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Shows one line for each package that pip fetches, and whatever it does not expect; its errors go to stderr unfiltered.
PIP_NOISE := ^ *(Collecting|Obtaining|Requirement already|Looking in|Attempting|Found existing|Uninstalling|Created|Stored|Installing coll|Successfully)|metadata \(|: started$$
PIP_INSTALL = $(VENV_PYTHON) -m pip install --disable-pip-version-check --progress-bar off -e '.[$(1)]' \
	| awk '!/$(PIP_NOISE)/ { print; fflush() }'

NATIVE := $(wildcard pallas_kernels/decode_attention/native/*)

$(INSTALLED): setup.cfg pyproject.toml setup.py $(NATIVE) $(STALE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "kvjax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not found)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' lacks the venv module (on Debian or Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@if [ -e $(INSTALLING) ] || ! $(VENV_PYTHON) -c 'import pip' 2>/dev/null; then $(REMOVE_VENV); fi
	@mkdir -p $(VENV)
	@touch $(INSTALLING)
	@test -x $(VENV_PYTHON) || { echo "Making $(VENV); the first install takes some minutes."; $(PYTHON) -m venv $(VENV); }
	@$(call PIP_INSTALL,test)
	@touch $(INSTALLED)
	@rm $(INSTALLING)
	@echo "Installed in $(VENV)."

$(LINT_INSTALLED) $(DOCS_INSTALLED): $(VENV)/.installed-%: $(INSTALLED)
	@$(call PIP_INSTALL,$*)
	@touch $@
