PYTHON ?= python3
PY := .venv/bin/python
PYTEST := $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: install train test test-fast test-sweep lint format bench

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: install
	$(PY) -m gshardx.train --config configs/quickstart.yaml

test: install
	$(PYTEST) -m "not sweep"

test-fast: install
	$(PYTEST) -m "not slow and not sweep"

test-sweep: install
	$(PYTEST) -m sweep

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install
	$(PY) benchmarks/train_cpu.py
