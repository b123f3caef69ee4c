# Everything a newcomer runs; `make demo` and `make test` set up what they need. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
STAMP  := $(VENV)/.set-up
OPS    := $(VENV)/.ops-built

PYTEST := $(BIN)/python -m pytest
PAIR   := -n 2 --dist loadfile --no-loadscope-reorder  # two files of tests at a time: one works while the other waits

export PATH := $(BIN):$(PATH)
.DEFAULT_GOAL := help
.PHONY: help setup demo check quick test suite lint types docs soak clean

help:
	@echo "make setup   .venv with the tested set of packages"
	@echo "make demo    a whole life of a small model on two CPU cores, some minutes"
	@echo "make check   lint, types and the short tests, under two minutes"
	@echo "make test    the CPU tests, twelve minutes on two cores"
	@echo "make soak    the long tests"
	@echo "make lint    ruff                 make types  mypy"
	@echo "make docs    the documentation site, docs/_site/index.html; a warning is an error"
	@echo "make clean   removes .venv, caches and the demo's results"

setup: $(STAMP) $(OPS)
	@:

# Also over a .venv made by hand: pip brings it to the pinned versions. The stamp is removed first, so that an
# installation that breaks off half-way is done again.
$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@rm -f $@ $(OPS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: PYTHON must be 3.11 or newer, but is " + sys.version.split()[0] + "; use make PYTHON=python3.11")'
	@command -v g++ >/dev/null || { echo "error: g++ must be installed, for DeepSpeed compiles its operations; install gcc and g++" >&2; exit 2; }
	@$(BIN)/python -c "import pip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the packages of requirements-dev.txt into $(VENV), some minutes at first ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Compiled at the first init_distributed of CPU ranks otherwise, twice at once, in the middle of somebody's first run.
$(OPS): $(STAMP)
	@echo "compiling DeepSpeed's communication operation for CPU ranks, a minute at first ..."
	@DS_ACCELERATOR=cpu $(BIN)/python -W ignore -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)' >$@.log 2>&1 \
		|| { cat $@.log >&2; exit 1; }
	@touch $@

demo: setup
	@$(BIN)/python tools/demo.py

check: # at once: mypy takes one core, and tests of two workers wait at times
	@$(MAKE) --no-print-directory -j 3 lint types quick

quick: setup
	@$(PYTEST) $(PAIR) -m "not gpu and not soak and not long and not alone"

test: setup
	@$(MAKE) --no-print-directory suite

suite: # with the packages in BIN; WITHOUT=once is what a second set of packages needs
	@$(PYTEST) $(PAIR) -m "not gpu and not soak and not alone$(if $(WITHOUT), and not $(WITHOUT))" -rs --durations=10
	@$(PYTEST) -m alone -rs $$(grep -rl "mark\.alone" tests --include=test_*.py)

soak: setup
	@$(PYTEST) -m soak -rs || { code=$$?; [ $$code -eq 5 ] && echo "there are no soak tests" || exit $$code; }

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: setup
	@$(BIN)/python -m mypy

docs: setup
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_site

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache docs/_site runs/demo
