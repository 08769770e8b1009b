# make demo      set up what the demo needs, then edit three facts in a real language model
# make test      set up the rest, then lint, types, and the tests (8 minutes on 2 cores)
# make test-all  the same with the tests marked long
# make test-pin  the quick tests on transformers 4.45.1, pyreft's own pin, in a second environment
# make test-python VERSION=3.12  the quick tests on another Python (python3.12 must be on the PATH), in an environment of its own
# make lint      ruff, pyright and the import contract alone
# make docs      build the documentation site into build/docs; a warning is an error
# make wheel     build the wheel and try it in a fresh environment without pyreft, outside the tree
# make clean     remove environments, caches and build results
#
# Set-up is done once, and again where constraints or setup.cfg have changed. PYTHON=python3.12 takes another
# interpreter (3.11 or later), PIP_ARGS="…" gives pip more arguments, e.g. an index with CPU builds of torch.
# JOBS=4 runs the tests in four processes, PYTEST_ARGS="…" gives pytest more arguments.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2

VENV := .venv
NEWEST := constraints/newest.txt
PIN := .venv-pin
DEMO_READY := $(VENV)/.ready-demo
READY := $(VENV)/.ready
PIN_READY := $(PIN)/.ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Python compiles a module when it is first imported and keeps the result: of 15,000 files, the fifth that is used.
# Without it every process spends 10 s more on importing torch and transformers.
unexport PYTHONDONTWRITEBYTECODE
PIP_FLAGS := -qq --no-input --no-compile $(PIP_ARGS)
# one thread for each of pytest's processes; a module's tests stay in one of them, with its fixtures
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup setup-pin demo test test-all test-pin test-python lint format docs wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup: $(READY)
setup-pin: $(PIN_READY)

# $(call install,environment,list): torch with what its platform needs, the rest exactly as listed
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or "$(NEWEST)".endswith("python3.10.txt") or sys.exit(f"Python {v[0]}.{v[1]} is too old for the pinned lists; PYTHON=python3.11")'
	@echo "setting up $(1) from $(2); torch is the largest download" >&2
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) "$$(grep '^torch==' $(2))"
	@$(1)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r $(2)
	@$(1)/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@touch $@
endef

# the first part of the list: what the package and the demo import
$(DEMO_READY): $(NEWEST) setup.cfg pyproject.toml
	@mkdir -p build && sed '/^# Beyond the demo/,$$d' $(NEWEST) > build/demo.txt
	$(call install,$(VENV),build/demo.txt)

$(READY): $(DEMO_READY)
	@echo "adding the test tools of $(NEWEST)" >&2
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r $(NEWEST)
	@touch $@

$(PIN_READY): constraints/pyreft-pin.txt setup.cfg pyproject.toml
	$(call install,$(PIN),constraints/pyreft-pin.txt)

demo: $(DEMO_READY)
	$(VENV)/bin/baft demo

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports --no-logo

format: $(READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

test: lint
	$(call PYTEST,$(VENV)) -m "not long"

test-all: lint
	$(call PYTEST,$(VENV))

test-pin: $(PIN_READY)
	$(call PYTEST,$(PIN)) -m "pin or (not slow and not long)"

test-python:
	$(MAKE) setup VENV=.venv-$(VERSION) PYTHON=python$(VERSION) NEWEST=$(firstword $(wildcard constraints/python$(VERSION).txt) $(NEWEST))
	$(call PYTEST,.venv-$(VERSION)) -m "not slow and not long"

docs: $(READY)
	$(VENV)/bin/python -m sphinx -W --keep-going -q docs build/docs

# dependencies are resolved from the wheel's own metadata here, held to the pinned versions
wheel: $(READY)
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel --no-isolation
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install $(PIP_FLAGS) -c constraints/newest.txt dist/*.whl
	cd build/fresh && bin/python -P $(CURDIR)/tests/wheel_smoke.py && bin/baft --help > /dev/null
	@ls -l dist

clean:
	rm -rf $(VENV) $(PIN) .venv-3.* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
