"""`openmemory-migrations tune`: candidates on a copy, what each finds, and the line that builds the best of them."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.db.catalog import Extension
from openmemory_migrations.settings import Settings
from openmemory_migrations.target import Target
from openmemory_migrations.verify.tuning import candidates
from tests.support.clustered_rows import clustered_rows
from tests.support.commands import NOTHING, alembic, om, result, start_om
from tests.support.interruption import kill
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.sessions import eventually
from tests.support.states import indexes, snapshot

ROWS, DIM = 1500, 32
FEW = ("--queries", "10")


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, clustered_rows(ROWS, DIM))
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
    return database


def tune(database: Database, code: int, *args: str, env: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    done = om(database, "tune", "--json", *FEW, *args, env=env)
    assert done.returncode == code, done.log
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def copies(database: Database) -> int:
    """How many copies there are, in whatever session."""
    return int(database.value("SELECT count(*) FROM pg_class WHERE relname LIKE 'openmemory_migrations_tune%'"))


@pytest.mark.slow
def test_the_best_is_built_by_its_line_and_keeps_its_word(table: Database) -> None:
    before = snapshot(table)

    found = tune(table, 0)

    assert snapshot(table) == before
    assert copies(table) == 0
    assert (found["rows"], found["of"]) == (ROWS, ROWS)
    tried = found["candidates"]
    assert {(one["method"], one["halfvec"]) for one in tried} >= {("ivfflat", False), ("hnsw", False)}
    assert all(one["build_seconds"] > 0 and one["bytes"] > 8192 for one in tried)
    assert any(one["on_frontier"] for one in tried)
    assert found["every_row"]["recall"] == 1
    best = found["best"]
    assert "index_halfvec" not in best["settings"]

    arguments = [part for name, value in best["settings"].items() for part in ("-x", f"{name}={value}")]
    assert om(table, "index", *arguments).returncode == 0
    ((_, valid),) = indexes(table).values()
    assert valid
    for name, value in best["session"].items():
        table.run(f"ALTER DATABASE {table.name} SET {name} = {shlex.quote(value)}")
    verified = om(table, "verify", *arguments, "--fail-under", "0.9")
    assert verified.returncode == 0, verified.log


@pytest.mark.slow
def test_what_is_printed_names_the_commands(table: Database) -> None:
    done = om(table, "tune", *FEW)

    assert done.returncode == 0, done.log
    assert "openmemory-migrations index -x index=" in done.stdout
    assert "OM_INDEX=" in done.stdout
    assert "aren't parallel" in done.stdout
    assert "SET ivfflat.probes = " in done.stdout or "SET hnsw.ef_search = " in done.stdout


@pytest.mark.slow
def test_a_sample_is_as_large_as_is_asked_for_and_lists_are_those_of_the_whole(table: Database) -> None:
    found = tune(table, 0, "--sample", "500", "-x", "index=ivfflat")

    assert 450 <= found["rows"] <= 500
    assert found["of"] == ROWS
    for one in found["candidates"]:
        if one["method"] == "ivfflat":
            lists = int(one["options"].removeprefix("lists = "))
            assert found["rows"] / lists >= 50


@pytest.mark.slow
def test_every_halfvec_candidate_is_half_the_size(table: Database) -> None:
    found = tune(table, 0)

    if not any(one["halfvec"] for one in found["candidates"]):
        pytest.skip("halfvec came with pgvector 0.7")
    by_name = {(one["method"], one["options"], one["halfvec"]): one["bytes"] for one in found["candidates"]}
    for (method, options, half), size in by_name.items():
        if not half:
            assert by_name[method, options, True] < size


@pytest.mark.slow
def test_no_index_reaches_what_can_not_be_reached(database: Database) -> None:
    create_table(database)
    load(database, random_rows(1000, 100))  # without a structure an index could go by
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})

    found = tune(database, 0, "--recall", "1")

    # all lists are every row
    assert found["best"]["settings"]["index"] == "ivfflat" or found["best"]["session"]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_by_the_metric_of_the_settings(table: Database, metric: str) -> None:
    found = tune(table, 0, "-x", f"index_metric={metric}")

    assert found["best"]["settings"]["index_metric"] == metric
    assert found["every_row"]["recall"] == 1


@pytest.mark.slow
def test_killed_it_leaves_nothing(table: Database) -> None:
    before = snapshot(table)
    process = start_om(table, "tune")
    eventually(lambda: copies(table) > 0)

    kill(process)

    eventually(lambda: copies(table) == 0)
    assert snapshot(table) == before


@pytest.mark.slow
def test_it_can_be_stopped(table: Database) -> None:
    process = start_om(table, "tune")
    eventually(lambda: copies(table) > 0)

    process.send_signal(signal.SIGINT)

    done = result(process)
    assert done.returncode == 3
    assert "stopped by SIGINT" in done.stderr
    assert "Traceback" not in done.stderr
    eventually(lambda: copies(table) == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "env", "args", "code", "said"),
    [
        (0, {"OM_VEC_DIM": "8"}, (), 1, "0 vectors to learn from"),
        (0, {}, (), 1, "has no dimensions"),
        (49, {}, (), 1, "49 vectors to learn from"),
        (60, {}, ("--queries", "0"), 2, "--queries is 0"),
        (60, {}, ("--recall", "2"), 2, "--recall is 2"),
        (60, {}, ("--sample", "0"), 2, "--sample is 0"),
        (60, {"OM_DATABASE_URL": ""}, (), 2, "no database is configured"),
    ],
)
def test_what_can_not_be_tuned(
    database: Database, rows: int, env: Mapping[str, str], args: tuple[str, ...], code: int, said: str
) -> None:
    create_table(database)
    load(database, random_rows(rows, 8))
    alembic(database, "upgrade", "head", env={name: value for name, value in env.items() if name == "OM_VEC_DIM"})

    done = om(database, "tune", *args, env=env)

    assert (done.returncode, done.stdout) == (code, ""), done.log
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_statement_timeout_of_the_roles_does_not_end_it(table: Database) -> None:
    table.run(f"ALTER ROLE postgres IN DATABASE {table.name} SET statement_timeout = '20ms'")

    assert tune(table, 0)["best"]


@pytest.mark.slow
def test_a_role_that_may_only_read_is_told_what_it_lacks(table: Database) -> None:
    role = f"reader_{table.name}"
    table.run(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON {TABLE} TO {role}")
    table.run(f"REVOKE TEMPORARY ON DATABASE {table.name} FROM PUBLIC")
    try:
        done = om(Database(table.name, table.url.replace("postgres@", f"{role}@")), "tune")
    finally:
        table.run(f"DROP OWNED BY {role}; DROP ROLE {role}")

    assert done.returncode == 1
    assert "permission denied to create temporary tables" in done.stderr


def test_a_server_that_is_read_only_is_told_apart(table: Database) -> None:
    table.run(f"ALTER DATABASE {table.name} SET default_transaction_read_only = on")

    done = om(table, "tune")

    assert done.returncode == 1
    assert f'ERROR:  no temporary table for a sample of "public.{TABLE}": cannot execute' in done.stderr
    assert "HINT:  On a standby, set OM_DATABASE_URL, or OM_PG_HOST and OM_PG_PORT, to the primary." in done.stderr


@pytest.mark.parametrize(
    ("version", "size", "halves"),
    [((0, 8), 384, {False, True}), ((0, 8), 2001, {True}), ((0, 6), 384, {False}), ((0, 6), 2001, set())],
)
def test_candidates_are_what_this_pgvector_can_build(version: tuple[int, ...], size: int, halves: set[bool]) -> None:
    found = list(candidates(Target("public", TABLE), Settings(), Extension("public", version), size, 20_000))

    assert {half for _, _, half in found} == halves
    assert all(20_000 / settings.index_lists >= 50 for settings, *_ in found if settings.index_lists)
