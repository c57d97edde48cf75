"""The cutover in a host's own chain, as `stubs --cutover` writes it: in hosts made by the real `alembic init`."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.hosts.project import CUTOVER, FINALIZE
from tests.support.host_init import Host, init, set_url
from tests.support.openmemory import Database, checksum, load, mismatches, random_rows
from tests.support.states import column_type

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("mode", "driver"), [("swap", "psycopg2"), ("drop", "psycopg"), ("swap", "asyncpg")])
def test_up_and_down_in_the_hosts_linear_history(tmp_path: Path, database: Database, mode: str, driver: str) -> None:
    host = init(tmp_path, database, "async" if driver == "asyncpg" else "generic", driver)
    host.alembic("upgrade", "head")
    load(database, random_rows(500, 8))
    before = checksum(database)
    host.ours("stubs", check=True)

    written = host.ours("stubs", "--cutover", mode, check=True)

    assert written.stdout.split() == [f"migrations/versions/{CUTOVER}_openmemory_cutover.py"]
    assert f'the revisions follow "{FINALIZE}", the only head' in written.stderr
    assert f'a revision is written, after "{FINALIZE}"' in written.stderr
    for _ in range(2):
        host.alembic("upgrade", "head")
        column = "v" if mode == "swap" else "v_vector"
        assert column_type(database, column) == "vector(8)"
        assert database.value(f"SELECT count({column}) FROM {TABLE}") == 500
        assert column_type(database, "v_bytea") == ("bytea" if mode == "swap" else None)

        host.alembic("downgrade", FINALIZE)
        assert checksum(database) == before
        assert mismatches(database) == []
    assert database.rows("SELECT version_num FROM alembic_version") == [(FINALIZE,)]


def test_it_is_one_revision_that_says_what_it_does(tmp_path: Path) -> None:
    host = init(tmp_path, None)
    host.ours("stubs", "--table", "vectors", check=True)

    host.ours("stubs", "--cutover", "drop", "--table", "vectors", check=True)

    assert 'def upgrade(**kw: object) -> None:\n    ops.upgrade_cutover(table="vectors", cutover="drop")\n' in text(
        host
    )
    assert 'ops.downgrade_cutover(table="vectors", cutover="drop")\n' in text(host)
    assert f'down_revision = "{FINALIZE}"\n' in text(host)
    again = host.ours("stubs", "--cutover", "drop")
    assert again.returncode == 1
    assert f'revision "{CUTOVER}" is there already' in again.stderr


def test_it_has_no_script_and_names_the_commands_to_run(tmp_path: Path) -> None:
    host = init(tmp_path, None)
    set_url(host, "postgresql+psycopg2://nobody@/nothing")
    host.ours("stubs", check=True)
    host.ours("stubs", "--cutover", "swap", check=True)
    there, back = f"{FINALIZE} -> {CUTOVER}", f"{CUTOVER} -> {FINALIZE}"
    for command, span, running in (
        ("upgrade", f"{FINALIZE}:head", f"upgrade {there}"),
        ("downgrade", f"head:{FINALIZE}", f"downgrade {back}"),
    ):
        done = host.alembic(command, span, "--sql", check=False)

        assert done.returncode != 0
        printed, _, said = done.stdout.partition("FAILED: ")
        # by Alembic and the host's own env.py, before they call the step
        assert printed == f"BEGIN;\n\n-- Running {running}\n\n"
        assert said.startswith("the cutover has no script (--sql), it runs online only\nHINT:  Run it online: ")
        assert said.endswith("(in a chain of the host's, the same command without --sql).\n")


def text(host: Host) -> str:
    (file,) = host.versions.glob(f"{CUTOVER}*")
    return file.read_text()
