"""upgrade, downgrade, current and sql of the console script: Alembic without an alembic.ini."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import ROOT, alembic, om
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, random_rows
from tests.support.states import BACKFILL, EXPAND, HEAD, indexes, snapshot, stamp, without_extension

DIM = 16


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(300, DIM))
    return database


def test_up_and_down_as_alembic_does(table: Database) -> None:
    v, before = checksum(table), without_extension(snapshot(table))

    assert om(table, "upgrade", EXPAND).returncode == 0
    assert stamp(table) == [EXPAND]
    done = om(table, "upgrade")
    assert done.returncode == 0
    assert done.stdout == ""
    assert f"backfill {TABLE}: 300 of 300 rows (100 %)" in done.stderr
    assert "Running upgrade om_20240107_pgvector -> om_20240107_backfill" in done.stderr
    assert stamp(table) == [HEAD]
    assert mismatches(table) == []
    assert indexes(table)

    # the two are one chain
    assert "Running" not in alembic(table, "upgrade", "head").stderr

    assert om(table, "current").stdout == f"{HEAD} (head)\n"
    assert json.loads(om(table, "status", "--json").stdout)["fine"]
    assert om(table, "downgrade", "-1").returncode == 0
    assert stamp(table) == [BACKFILL]
    assert om(table, "downgrade", "base").returncode == 0
    assert stamp(table) == []
    assert without_extension(snapshot(table)) == before
    assert checksum(table) == v


@pytest.mark.slow
def test_as_json_they_say_what_has_come_of_it(table: Database) -> None:
    up = om(table, "upgrade", "--json")
    assert json.loads(up.stdout) == {"revisions": [HEAD], "at_head": True}
    assert "Running upgrade" in up.stderr
    assert json.loads(om(table, "downgrade", "-1", "--json").stdout) == {"revisions": [BACKFILL], "at_head": False}
    assert json.loads(om(table, "downgrade", "base", "--json").stdout) == {"revisions": [], "at_head": False}
    script = json.loads(om(None, "sql", "--json", "-x", "vec_dim=16").stdout)["script"]
    assert script == om(None, "sql", "-x", "vec_dim=16").stdout
    assert "CREATE INDEX CONCURRENTLY" in script


@pytest.mark.slow
def test_quiet_says_only_what_is_wrong(table: Database) -> None:
    table.run(f"UPDATE {TABLE} SET v = '' WHERE user_id = 'user1'")

    done = om(table, "upgrade", "--quiet")

    assert done.returncode == 0
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"WARNING", "DETAIL", "HINT"}


@pytest.mark.slow
def test_settings_and_their_mistakes(table: Database) -> None:
    assert om(table, "upgrade", "-x", "index=hnsw", "-x", "backfill_engine=server").returncode == 0
    assert "USING hnsw" in next(iter(indexes(table).values()))[0]

    for args, said in [
        (("upgrade", "-x", "indx=hnsw"), 'unknown setting "indx"'),
        (("upgrade", "nonsense"), "Can't locate revision identified by 'nonsense'"),
        (("downgrade",), "the following arguments are required: revision"),
        (("downgrade", "+1"), "Relative revision"),
        (("sql", "--down"), "a script down needs to know from where"),
    ]:
        done = om(table, *args)
        assert done.returncode == 2, (args, done.log)
        assert said in done.stderr, args
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_refusal_is_exit_code_1(table: Database) -> None:
    done = om(table, "upgrade", "-x", f"vec_dim={DIM + 1}")

    assert done.returncode == 1
    assert f"ERROR:  no row holds a vector of {DIM + 1} dimensions" in done.stderr
    assert stamp(table) is None


@pytest.mark.slow
def test_scripts_are_those_of_alembic(server: embedded.Server, table: Database) -> None:
    env = {"OM_VEC_DIM": str(DIM)}

    up = om(None, "sql", env=env)
    down = om(None, "sql", "--down", "head:base", env=env)

    assert up.stdout == alembic(None, "upgrade", "head", "--sql", env=env).stdout
    assert down.stdout == alembic(None, "downgrade", "head:base", "--sql", env=env).stdout
    assert om(None, "sql", f"{EXPAND}:{BACKFILL}", env=env).stdout.count("Running upgrade") == 1
    expected: list[str]
    for script, expected in ((up, [HEAD]), (down, [])):
        subprocess.run(
            [server.psql, "-XqAt", "-v", "ON_ERROR_STOP=1", table.url], input=script.stdout, text=True, check=True
        )
        assert (stamp(table) or []) == expected


def test_without_a_database_nothing_is_guessed() -> None:
    for args in (("upgrade",), ("current",), ("downgrade", "base")):
        done = om(None, *args)
        assert done.returncode != 0
        assert "no database is configured" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "status", "verify", "tune", "index", "backfill", "report"])
def test_where_there_is_no_postgres_there_is_nothing_to_do_and_json_all_the_same(command: str) -> None:
    done = om(None, command, "--json", env={"OM_METADATA_BACKEND": "sqlite"})

    assert done.returncode == 0, done.log
    assert isinstance(json.loads(done.stdout), dict)
    assert "OM_METADATA_BACKEND is sqlite" in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    script = f"{sys.executable} -m openmemory_migrations sql -x vec_dim=8 | head -1; echo ${{PIPESTATUS[0]}}"

    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)

    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 2
