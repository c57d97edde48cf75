PYTHON ?= python3

help:          ## print this
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: .venv/installed ## virtual environment in .venv, with everything that the lines below need

demo: install  ## migrate real rows on a throw-away PostgreSQL, check every bit, and take it all back
	.venv/bin/python -m demo

test: install  ## the tests, without the slow ones
	.venv/bin/python -m pytest -n 2

test-slow: install ## the slow tests, without those that are one more combination of the same
	.venv/bin/python -m pytest -n 2 -m 'slow and not exhaustive'

test-all: install ## all tests; more than an hour
	.venv/bin/python -m pytest -n 2 -m ''

bench: install ## how fast the backfill is, against rivals and the server's own pace; some 30 minutes (BENCH="--rows 10000 …")
	.venv/bin/python -m bench $(BENCH)

check: install ## formatting, lint, types
	.venv/bin/ruff format --check && .venv/bin/ruff check && .venv/bin/mypy

format: install ## mend formatting and what lint can mend
	.venv/bin/ruff check --fix-only && .venv/bin/ruff format

clean:         ## remove what was made here
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.PHONY: help install demo test test-slow test-all bench check format clean
