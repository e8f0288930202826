# make             .venv with rag_mm and the command .venv/bin/rag-mm
# make quickstart  the whole chain on two CPU cores, with a report at the end
# make test        lint and the fast tests;  make test-slow  the rest
# make picture     the README's first picture, from the story of runs/quickstart
# make plans       docs/results/plans.md, by the TPU's compiler; an hour, resumable
# make lock        resolves requirements.lock again for Python 3.11-3.13

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that fits; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip --no-input --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint requirements.lock
PYTEST := $(BIN)/python -m pytest
STORY := runs/quickstart/report/figures/story.png

.PHONY: all quickstart test test-slow lint plans picture lock clean
all: $(VENV)/.installed

quickstart: $(VENV)/.installed
	launch/local.sh quickstart

test: lint
	$(PYTEST) -q -m "not slow and not parity"

test-slow: $(VENV)/.installed-slow
	$(PYTEST) -q -m "slow or parity"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

plans: $(VENV)/.installed-slow
	$(BIN)/python -m rag_mm.perf.plan.write_page

picture:
	@test -f $(STORY) || { echo "There is no $(STORY); run make quickstart first." >&2; exit 2; }
	cp $(STORY) docs/images/quickstart.png

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "rag_mm needs Python 3.11, 3.12 or 3.13; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# A stamp is older than what it depends on exactly when there is something to install.
$(VENV)/.installed: setup.py pyproject.toml requirements.lock | $(BIN)/python
	$(INSTALL) --editable '.[explore]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable '.[explore,test]'
	@touch $@

$(VENV)/.installed-slow: $(VENV)/.installed-test
	$(INSTALL) --editable '.[explore,test,parity,tpu]'
	@touch $@

# torch is left to its extra's pin: its wheels, and what they need, differ by accelerator. One version of
# each package for all Pythons, so that what is tested on one is what runs on the others.
lock: $(BIN)/python
	$(PIP) install --quiet uv
	echo 'transformers>=5,<6' | $(BIN)/uv pip compile --quiet setup.py - --extra test --extra tf --extra tpu --extra explore \
		--universal --python-version 3.11 --fork-strategy fewest --upgrade --no-header --no-annotate \
		--no-emit-index-url --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
