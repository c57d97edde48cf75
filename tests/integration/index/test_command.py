"""`openmemory-migrations index`: another vector index in the place of the one that is there, while searches go on."""

from __future__ import annotations

import json
import re

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.sql import quote
from tests.support.commands import alembic, om, result, start_om
from tests.support.index_builds import (
    AS_HNSW,
    DIM,
    HNSW,
    NEW,
    OLD,
    READER,
    ROWS,
    always_searchable,
    as_ivfflat,
    index,
    leave_invalid,
    oid,
    table,
)
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.running import transaction
from tests.support.sessions import eventually
from tests.support.states import BACKFILL, HEAD, INDEX, INVALIDATE, SECOND_INDEX, indexes, plan, snapshot, stamp
from tests.support.writers import writing

__all__ = ["table"]  # a fixture

WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"


def test_from_one_index_to_another_and_back(table: Database) -> None:
    before = snapshot(table)
    with always_searchable(table) as seen:
        done = index(table, env=HNSW)
    assert seen[-1] == {INDEX}
    assert indexes(table) == {INDEX: (AS_HNSW, True)}
    assert done.stdout == ""
    assert f'index "{INDEX}" is not as wanted: it is ivfflat with vector_l2_ops on v_vector (lists=2)' in done.stderr
    assert "hnsw.iterative_scan" in done.stderr
    assert stamp(table) == [HEAD]

    kept = oid(table)
    assert f'index "{INDEX}" exists already and is as wanted' in index(table, env=HNSW).stderr
    assert oid(table) == kept

    with always_searchable(table):
        index(table, "-x", "index_lists=7")
    assert indexes(table) == {INDEX: (as_ivfflat(7), True)}

    # as if it had never been another
    index(table, "--rebuild")
    assert indexes(table) == {INDEX: (as_ivfflat(2), True)}
    after = snapshot(table)
    assert after == before
    assert mismatches(table) == []


@pytest.mark.slow
def test_none_and_anew(table: Database) -> None:
    done = index(table, "--json", env={"OM_INDEX": "none"})
    assert indexes(table) == {}
    assert json.loads(done.stdout) == {"index": None, "built": False}
    assert f'index "{INDEX}" of "public.{TABLE}" dropped' in done.stderr
    assert "does not exist, skipping" in index(table, "-x", "index=none").stderr

    shown = json.loads(index(table, "--json", env=HNSW).stdout)
    assert indexes(table) == {INDEX: (AS_HNSW, True)}
    assert (shown["index"], shown["built"], shown["method"]) == (INDEX, True, "hnsw")
    assert f"Index Scan using {INDEX}" in plan(table, shown["query"].replace("$1", f"'{[1.0] * DIM}'"))
    assert json.loads(index(table, "--json", env=HNSW).stdout)["built"] is False

    # what is there is the chain's, whatever it is
    alembic(table, "downgrade", BACKFILL)
    assert indexes(table) == {}
    alembic(table, "upgrade", "head")
    assert indexes(table) == {INDEX: (as_ivfflat(2), True)}


@pytest.mark.slow
def test_a_table_that_was_empty_at_finalize_gets_its_index_by_the_hint(database: Database) -> None:
    create_table(database)
    log = alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)}).stderr
    assert "When there are more rows: openmemory-migrations index." in log
    load(database, random_rows(49, DIM))

    done = index(database, code=1)
    assert f'ERROR:  no index on "v_vector" of "public.{TABLE}": ivfflat needs 50 rows to learn from' in done.stderr
    assert "HINT:  When there are more rows: openmemory-migrations index." in done.stderr
    assert indexes(database) == {}

    load(database, random_rows(1, DIM, seed=1))
    index(database)
    assert indexes(database) == {INDEX: (as_ivfflat(1), True)}
    assert om(database, "status").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "lists", "said"),
    [
        (1_400, 3, "exists already and is as wanted"),  # less than twice the 2 that there are
        (2_500, 5, f'"{INDEX}" has lists = 2, its rows ask for 5 now'),
        (-2_490, None, "ivfflat needs 50 rows"),
    ],
)
def test_an_index_that_its_rows_have_outgrown_is_replaced(
    table: Database, more: int, lists: int | None, said: str
) -> None:
    if more > 0:
        load(table, random_rows(more, DIM, seed=1))
    else:
        table.run(f"DELETE FROM {TABLE} WHERE ctid IN (SELECT ctid FROM {TABLE} LIMIT {-more})")
    before = oid(table)

    done = index(table, code=0 if lists else 1)

    assert said in done.stderr
    kept = lists == 3 or lists is None
    assert (oid(table) == before) == kept
    assert indexes(table) == {INDEX: (as_ivfflat(2 if kept else lists or 0), True)}
    # a number that was asked for is as wanted, however many rows there are
    assert "exists already" in index(table, "-x", f"index_lists={2 if kept else lists}").stderr
    index(table, "-x", "index_lists=2", "--rebuild")
    assert oid(table) != before


@pytest.mark.slow
def test_writers_lose_nothing_and_wait_for_nobody(database: Database) -> None:
    rows = random_rows(ROWS, DIM)
    create_table(database)
    load(database, rows)
    alembic(database, "upgrade", "head")

    with writing(database, rows) as threads, always_searchable(database):
        for env in (HNSW, {"OM_INDEX_LISTS": "5"}, HNSW):
            index(database, env=env)
            assert len(indexes(database)) == 1
    assert max(thread.longest_wait for thread in threads) < 5
    assert indexes(database) == {INDEX: (AS_HNSW, True)}
    assert mismatches(database) == []


TAKEN = {
    "a table": ("CREATE TABLE {} (id int)", "something that is no index"),
    "a view": ("CREATE VIEW {} AS SELECT 1 AS one", "something that is no index"),
    "another index": (f"CREATE INDEX {{}} ON {TABLE} (dim)", "a btree index on dim"),
    "another table's": ("CREATE TABLE other (id int); CREATE INDEX {} ON other (id)", "an index of another table"),
    "another table's vectors": (
        "CREATE TABLE other (w vector(8)); CREATE INDEX {} ON other USING hnsw (w vector_l2_ops)",
        "an index of another table",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "taken", "by"),
    [
        *(pytest.param(INDEX, *taken, id=f"by {what}") for what, taken in TAKEN.items()),
        *(pytest.param(name, *TAKEN["a view"], id=name) for name in (NEW, OLD)),
    ],
)
def test_a_name_that_is_taken_is_said_and_nothing_is_changed(table: Database, name: str, taken: str, by: str) -> None:
    if name == INDEX:
        index(table, env={"OM_INDEX": "none"})
    table.run(taken.format(name))
    before = snapshot(table)

    done = index(table, "--quiet", env=HNSW, code=1)

    assert f'ERROR:  no index: the name "{name}" is taken by {by}\n' in done.stderr
    assert "HINT:  Rename that, then: openmemory-migrations index." in done.stderr
    assert snapshot(table) == before
    # and is no reason to keep what is ours
    index(table, env={"OM_INDEX": "none"})
    assert len(snapshot(table)["indexes"]) == len(before["indexes"]) - (name != INDEX)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-x", "index_memory=1MB", "-x", "index_lists=2000"], "of memory even for one list"),
        (["-x", "index=btree"], "OM_INDEX must be"),
        (["-x", "vector_table=elsewhere"], 'table "public.elsewhere" does not exist'),
    ],
)
def test_what_can_not_be_had_is_an_error_and_the_index_that_is_there_stays(
    table: Database, args: list[str], said: str
) -> None:
    before = snapshot(table)

    done = index(table, "--quiet", *args, code=2 if "btree" in said or "must be" in said else 1)

    assert re.search(rf"^ERROR:  .*{said}|^HINT:  .*{said}", done.stderr, re.MULTILINE), done.stderr
    assert done.stdout == ""
    assert snapshot(table) == before


@pytest.mark.slow
def test_before_there_is_a_column_of_ours_and_before_finalize(database: Database) -> None:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    assert 'no column "v_vector"' in index(database, code=1).stderr

    alembic(database, "upgrade", BACKFILL)
    index(database, env=HNSW)
    assert stamp(database) == [BACKFILL]
    assert "exists already and is as wanted" in alembic(database, "upgrade", "head", env=HNSW).stderr
    assert indexes(database) == {INDEX: (AS_HNSW, True)}


@pytest.mark.slow
def test_v_that_is_a_vector_already_has_the_index_of_newer_openmemory(database: Database) -> None:
    database.run(f"CREATE EXTENSION vector; CREATE TABLE {TABLE} (id uuid, sector text, v vector(3), dim integer)")

    index(database)

    assert list(indexes(database)) == ["openmemory_vectors_hnsw_idx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "left",
    [
        pytest.param(f"ALTER INDEX {INDEX} RENAME TO {OLD}", id="only the old one"),
        pytest.param(
            f"CREATE INDEX {NEW} ON {TABLE} USING hnsw (v_vector vector_l2_ops) WITH (m=16, ef_construction=64)",
            id="a new one that is as wanted",
        ),
        pytest.param(f"CREATE INDEX {NEW} ON {TABLE} USING hnsw (v_vector vector_ip_ops)", id="another new one"),
        pytest.param(
            f"CREATE INDEX {NEW} ON {TABLE} USING hnsw (v_vector vector_ip_ops);"
            f"CREATE INDEX {OLD} ON {TABLE} USING hnsw (v_vector vector_ip_ops)",
            id="new and old",
        ),
        pytest.param(
            f"CREATE INDEX {SECOND_INDEX} ON {TABLE} USING hnsw (v_vector vector_l2_ops)",
            id="a duplicate of the wanted",
        ),
        pytest.param(INVALIDATE, id="an invalid one"),
    ],
)
def test_whatever_an_earlier_run_has_left_it_ends_the_same(table: Database, left: str) -> None:
    table.run(left)
    new = table.value("SELECT to_regclass(%s)::oid", NEW)

    done = index(table, *(["--rebuild"] if new else []), env=HNSW)

    assert indexes(table) == {INDEX: (AS_HNSW, True)}
    if "m=16" in left:
        assert oid(table) == new
        assert f'index "{NEW}" is left by a run that was interrupted, is as wanted, and takes its place' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [INDEX, NEW])
def test_an_invalid_index_goes(table: Database, name: str) -> None:
    if name == INDEX:
        index(table, env={"OM_INDEX": "none"})
    leave_invalid(table, name, f"{TABLE} USING hnsw (v_vector vector_l2_ops)")
    assert om(table, "status").returncode == 1

    assert f'index "{name}" is' in index(table).stderr

    assert indexes(table) == {INDEX: (as_ivfflat(2), True)}


@pytest.mark.slow
def test_a_downgrade_takes_what_an_interrupted_run_has_left(table: Database) -> None:
    for name in (NEW, OLD):
        table.run(f"CREATE INDEX {name} ON {TABLE} USING hnsw (v_vector vector_l2_ops)")

    alembic(table, "downgrade", BACKFILL)

    assert indexes(table) == {}


@pytest.mark.slow
def test_the_renaming_waits_for_a_lock_in_short_tries(table: Database) -> None:
    comment = f"COMMENT ON INDEX {INDEX} IS 'mine'"
    with transaction(table, comment) as other, always_searchable(table):
        process = start_om(table, "index", env=HNSW | {"OM_LOCK_TIMEOUT_MS": "50"})
        eventually(lambda: indexes(table).get(NEW, ("", False))[1])
        eventually(lambda: table.value(WAITING))
        eventually(lambda: not table.value(WAITING))
        other.rollback()
        done = result(process)
    assert done.returncode == 0, done.log
    assert f'renaming index "{NEW}" to "{INDEX}": canceling statement due to lock timeout' in done.stderr
    assert indexes(table) == {INDEX: (AS_HNSW, True)}


@pytest.mark.slow
def test_it_waits_for_another_run_and_for_old_transactions(table: Database) -> None:
    with transaction(table, *READER) as other, always_searchable(table):
        first = start_om(table, "index", env=HNSW)
        eventually(lambda: NEW in indexes(table))
        second = start_om(table, "index", env={"OM_INDEX_LISTS": "4"})
        eventually(lambda: table.value("SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^openmem'") > 3)
        other.rollback()
        assert [result(process).returncode for process in (first, second)] == [0, 0]
    assert indexes(table) == {INDEX: (as_ivfflat(4), True)}


@pytest.mark.slow
def test_another_table_with_an_odd_name_in_another_schema(database: Database) -> None:
    schema, name = 'od"d 50%:s', "t" * 50 + 'é"{x}:y %'
    create_table(database)
    load(database, random_rows(200, DIM))
    database.run(f"CREATE SCHEMA {quote(schema)}")
    database.run(f"ALTER TABLE {TABLE} SET SCHEMA {quote(schema)}")
    database.run(f"ALTER TABLE {quote(schema)}.{TABLE} RENAME TO {quote(name)}")
    env = {"OM_PG_SCHEMA": schema, "OM_VECTOR_TABLE": name}
    alembic(database, "upgrade", "head", env=env)

    for more in (HNSW, {"OM_INDEX_LISTS": "3"}):
        index(database, env=env | more)
        ((found, (definition, valid)),) = indexes(database, name, schema).items()
        assert valid
        assert (more.get("OM_INDEX") or "lists='3'") in definition
        assert found.endswith("_vvector_idx")
    alembic(database, "downgrade", "base", env=env)
    assert indexes(database, name, schema) == {}
