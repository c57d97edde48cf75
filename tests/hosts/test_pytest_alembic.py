"""pytest-alembic's default tests pass in a host that uses the stubs, set up as docs/hosts.md says.

They run in a pytest of their own in the host's folder. This run keeps the plugin out (`-p no:pytest_alembic` in
pyproject.toml): under pytest 9.2 it breaks the collection wherever there is a tests/conftest.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.host_styles import Host, create
from tests.support.openmemory import Database

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytest_alembic") is None, reason="pytest-alembic is not installed"
)
TESTS = ("test_single_head_revision", "test_upgrade", "test_model_definitions_match_ddl", "test_up_down_consistency")


@pytest.fixture
def host(database: Database, tmp_path: Path) -> Host:
    """A host that is edited as the page says."""
    page = (ROOT / "docs" / "hosts.md").read_text()
    conftest, tests, edit = re.findall(r"(?s)```python\n(.*?)```", page[page.index("## pytest-alembic") :])
    host = create(tmp_path / "host", "generic", database)
    (host.folder / "conftest.py").write_text(conftest)
    (host.folder / "test_migrations.py").write_text(tests)
    (host.folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    env = host.env.read_text()
    assert "connectable = engine_from_config(\n" in env
    env = env.replace("connectable = engine_from_config(\n", edit)
    env = env.replace("from models", "import pgvector.sqlalchemy\nfrom models")
    env = env.replace("from models", "from openmemory_migrations import autogenerate\nfrom models")
    include = "include_object=autogenerate.include_object, target_metadata=target_metadata"
    host.env.write_text(env.replace("target_metadata=target_metadata", include))
    return host


def run(host: Host, database: Database) -> tuple[int, str]:
    """Runs pytest there as a host does; returns its exit code and output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OM_", "PG", "BACKFILL_", "PYTEST"))}
    url = database.url.replace("postgresql:", "postgresql+psycopg2:")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"],
        cwd=host.folder,
        env=clean | {"TEST_DATABASE_URL": url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


def test_its_default_tests_pass_in_a_host_with_stubs(host: Host, database: Database) -> None:
    code, log = run(host, database)
    assert code == 0, log
    for test in TESTS:
        assert re.search(rf"::{test} PASSED", log), log
    assert "4 passed" in log


@pytest.mark.slow
def test_they_fail_where_a_step_has_no_way_back(host: Host, database: Database) -> None:
    (stub,) = (host.folder / "migrations/versions").glob("om_20240107_pgvector*")
    stub.write_text(stub.read_text().replace("ops.downgrade_expand()", "raise ValueError('no way back')"))
    code, log = run(host, database)
    assert code == 1, log
    assert re.search("::test_up_down_consistency FAILED", log), log
    assert "3 passed" in log
