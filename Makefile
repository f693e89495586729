# setup: an environment with everything that tests and benchmarks need. quick: without slow tests. test: all of it.
PYTHON ?= python

setup:
	$(PYTHON) -m pip install -e ".[test]"

test:
	$(PYTHON) -m pytest -n 2

quick:
	$(PYTHON) -m pytest -q -n 2 -m "not slow"

lint:
	ruff check . && ruff format --check . && mypy

bench:
	$(PYTHON) benchmarks/all.py

.PHONY: setup test quick lint bench
