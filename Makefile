PYTHON ?= python3
# COVERAGE='-m coverage run' measures it
COVERAGE_REPORT = .venv/bin/python -m coverage combine --quiet && .venv/bin/python -m coverage report
PYTEST = .venv/bin/python $(COVERAGE) -m pytest -n 2
SERVER ?= 16-0.6.2
# what depends on the server, of these files the quick tests, and of those all that CI runs
ON_A_SERVER = $(addprefix tests/, faults/test_locks.py $(addprefix integration/, backfill/test_batch_cost.py \
	backfill/test_server_engine.py cutover/test_application.py cutover/test_cutover.py native/test_steps.py \
	partitions/test_chain.py partitions/test_index.py preflight/test_check.py steps/test_*.py verify/test_comparison.py \
	verify/test_search.py))
ALL_ON_A_SERVER = $(addprefix tests/, faults/test_locks.py $(addprefix integration/, cli/test_status.py \
	index/test_existing.py preflight/test_findings.py verify/test_search.py verify/test_tune.py))

help:          ## print this
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

install: .venv/installed ## virtual environment in .venv, with everything that the lines below need

demo: install  ## migrate real rows on a throw-away PostgreSQL, check every bit, and take it all back
	.venv/bin/python -m demo

test: install  ## the tests, without the slow ones
	$(PYTEST)

test-slow: install ## the slow tests, without those that are for test-all
	$(PYTEST) -m 'slow and not exhaustive'

test-server: install .cache/pgserver-0.6.2 ## what depends on the server, on SERVER=16 or 16-0.6.2, its pgvector
	OM_TEST_SERVER=$(SERVER) $(PYTEST) -m 'server and not slow' $(ON_A_SERVER)
	OM_TEST_SERVER=$(SERVER) $(PYTEST) -m 'slow and not exhaustive' $(ALL_ON_A_SERVER)

test-all: install ## all tests, and those of test-server on PostgreSQL 16 with pgvector 0.8
	$(PYTEST) -m ''
	$(MAKE) test-server SERVER=16

coverage: install ## of lines and branches, by all that CI runs; the largest holes first
	rm -rf .cache/coverage
	$(MAKE) test test-slow COVERAGE='-m coverage run'
	$(COVERAGE_REPORT)

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

# its programs are run, its Python never: any interpreter's wheel will do
.cache/pgserver-0.6.2: .venv/installed
	.venv/bin/python -m pip install --quiet --no-deps --only-binary :all: --python-version 3.12 --target $@ pgserver==0.1.4

.PHONY: help install demo test test-slow test-server test-all coverage bench check format clean
