# `make demo` and `make test` make .venv with everything at the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test lint types clean

demo: .venv/made
	$(BIN)/windfall run lottery

test: .venv/made lint
	$(BIN)/python -m pytest

lint: .venv/made
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/made
	$(BIN)/pyright

# torch is asked for by its exact version: on Linux any other request fetches gigabytes for GPUs.
.venv/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/made

clean:
	rm -rf .venv .pytest_cache .ruff_cache
