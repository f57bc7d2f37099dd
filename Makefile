# `make demo`, `make test`, `make check` each set up .venv by themselves, and again only when the dependencies changed.
SHELL := /bin/bash
# the first Python that is new enough, unless PYTHON=... names one
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# what is imported is compiled once and kept, not anew in each of Ray's many processes
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-multinode test-gpu check format bench docs constraints clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: raypar needs Python 3.11 or newer with venv: install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(READY)  ## shapes: prepare, train on 2 workers, evaluate, predict, export and one request to the service
	$(BIN)/python jobs/demo.py

test: $(READY)  ## unit, integration and, where the machine can, multi-node tests; the unit tests beside the others, which wait a lot
	@log=$$(mktemp); nice -n 5 $(BIN)/python -m pytest -q tests/unit tests/attack > $$log 2>&1 & unit=$$!; \
	$(BIN)/python -m pytest -q -m "not gpu" --durations=20 tests/integration tests/multinode; status=$$?; \
	wait $$unit || status=1; cat $$log; rm -f $$log; exit $$status

test-multinode: $(READY)  ## only the tests with several Ray nodes
	$(BIN)/python -m pytest -q -m multinode

test-gpu: $(READY)  ## only the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu

check: $(READY)  ## ruff, ruff format, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## every benchmark with its defaults, one after the other, for hours: leave the machine idle
	@failed=; for script in $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py))); do \
		case $$script in */resume.py) runs='exact elastic preempted';; *) runs=defaults;; esac; \
		for run in $$runs; do \
			echo "== $$script $$run"; $(BIN)/python $$script $${run#defaults} || failed="$$failed $$script($$run)"; \
		done; \
	done; [ -z "$$failed" ] || { echo "failed, or below the goal:$$failed" >&2; exit 1; }

docs: $(READY)  ## docs/run_file.md and docs/yolo_keys.md from the code
	$(BIN)/python docs/generate.py

constraints:  ## constraints.txt: the newest versions that pyproject.toml allows, from an empty environment
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --upgrade -e '.[dev]'
	{ grep '^#' constraints.txt; .venv-constraints/bin/python -m pip list --format=freeze --exclude raypar --exclude pip --exclude setuptools \
		| sed 's/+[A-Za-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-constraints

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
