# Two commands for a fresh machine: `make quickstart` (data → training → speech) and `make test`; `make quick` is the
# part of the tests that says within 90 seconds whether a change has broken something.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the quickstart leaves its corpus, datasets, run and report.
OUT ?= quickstart-out
DATA ?=
# More flags of examples/quickstart/run.py, such as ARGS="stages.sft.tokens=10M".
ARGS ?=
# Where nothing may be written beside a module, every process compiles torch and megatron-core anew: ten seconds each.
export PYTHONDONTWRITEBYTECODE :=
STAMP := $(VENV)/.installed

.PHONY: quickstart test quick venv lint clean

quickstart: venv
	$(BIN)/python examples/quickstart/run.py --output-dir $(OUT) $(if $(DATA),--data $(DATA)) $(ARGS)

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests

quick: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not distributed" tests

venv: $(STAMP)

# torch comes first and by its exact pin: every other package then finds its requirement met. Python compiles a module
# when it is first imported: to compile all of them here would take as long as a tenth of the tests.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test,lint]'
	touch $(STAMP)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m megatron_speech.ops.compile_check

clean:
	rm -rf $(VENV) build *.egg-info $(OUT) megatron_speech/*.so
