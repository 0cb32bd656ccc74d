# make setup     .venv in this checkout, with .venv/bin/mtx
# make rehearsals  what `mtx rehearse` compiles with, 390 MB, beside the environment's packages
# make train     a small GPT from the text that comes with mtx: tokenizer, token stores, training, a sample, report.html
# make test      lint, types and the tests that take seconds
# make test-all  the slow tests as well
#
# PYTHON=python3.12 chooses the interpreter, VENV=DIR another environment, WORKERS=N how many tests run at a time.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPILER := $(VENV)/mtx-plan
REQUIREMENTS := pyproject.toml requirements.txt $(wildcard constraints-*.txt)

TEXT := texts/austen.jsonl.gz
TOKENIZER := stores/austen/tokenizer.model
STORES := stores/austen/train/manifest.json stores/austen/validation/manifest.json

SELECTED ?= not slow
# Files of tests go to one worker each: what a file compiles is compiled once.
WORKERS ?= 2

.PHONY: setup rehearsals train test test-all check pytest
.DELETE_ON_ERROR:

setup: $(READY)
	@:

$(READY): $(REQUIREMENTS)
	@if ! version=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); then \
	    echo "make: $(PYTHON) does not run; name a Python 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 2; \
	elif ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo "make: $(PYTHON) is Python $$version, mtx needs 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 2; \
	elif ! "$(PYTHON)" -c 'import venv, ensurepip' 2> /dev/null; then \
	    echo "make: Python $$version comes without venv; on Debian and Ubuntu: apt install python$$version-venv" >&2; exit 2; \
	fi; \
	pins=constraints-$$version.txt; \
	if [ -f $$pins ]; then \
	    echo "setting up $(VENV) for Python $$version with the versions of $$pins (a minute or two)"; \
	else \
	    echo "setting up $(VENV) for Python $$version with the newest versions allowed: there is no $$pins"; pins=/dev/null; \
	fi; \
	"$(PYTHON)" -m venv "$(VENV)"; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint $$pins --editable '.[test]'; \
	touch "$@"; \
	echo "$(BIN)/mtx is ready"

# Not among the packages: there JAX tries to start it, and complains, wherever there is no GPU.
rehearsals: $(COMPILER)
	@:

$(COMPILER): $(READY)
	@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jaxlib"))'); \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$@" \
	    "jax-cuda13-pjrt==$$version"; \
	touch "$@"

# What exists is never made again: tokenizers and stores do not change, and a run goes on where its folder stands.
train: $(STORES)
	@$(BIN)/mtx train configs/runs/quickstart.gin --run-dir runs/quickstart --sample "It was a truth"

$(TOKENIZER): | $(READY)
	@mkdir -p $(@D)
	@$(BIN)/mtx tokenizer train $(TEXT) --select 'train/*' --vocab-size 4096 --out $@

# The part of the text is the name of the store: train or validation.
$(STORES): stores/austen/%/manifest.json: | $(TOKENIZER)
	@$(BIN)/mtx data build $(TEXT) --select '$*/*' --tokenizer $(TOKENIZER) --out $(@D)

test: check pytest

check: setup
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

pytest: setup
	@$(BIN)/python -m pytest -q -m '$(SELECTED)' --numprocesses $(WORKERS) --dist loadfile

test-all:
	@$(MAKE) --no-print-directory test SELECTED=
