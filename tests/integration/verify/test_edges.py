"""`verify` where there is hardly anything to search: no row, one, bad ones only, zeros, all the same."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from demo.openmemory import TABLE, drop_database
from openmemory_migrations import embedded
from tests.support.commands import om
from tests.support.openmemory import SECTORS, Database, Row, create_table, load, pack, random_rows
from tests.support.states import HEAD
from tests.support.verification import verify

pytestmark = pytest.mark.slow

DIM = 8
GATE = ("--fail-under", "0.9")
ENV = {"OM_VEC_DIM": str(DIM)}


def migrated_with(database: Database, rows: list[Row], **env: str) -> Database:
    create_table(database)
    load(database, rows)
    done = om(database, "upgrade", HEAD, env=ENV | env)
    assert done.returncode == 0, done.log
    return database


def codes(found: dict[str, Any]) -> list[str]:
    return [one["code"] for one in found["findings"]]


@pytest.mark.parametrize("method", ["ivfflat", "hnsw"])
def test_an_empty_table(database: Database, method: str) -> None:
    migrated_with(database, [], OM_INDEX=method)

    found = verify(database, 0, *GATE)

    assert found["comparison"]["rows"] == 0
    assert (found["search"], found["not_searched"]) == (None, "no row has a vector to ask with")
    assert "searches: none: no row has a vector to ask with\n" in om(database, "verify").stdout
    assert verify(database, 0, "--sample", "5")["comparison"]["sampled"] is False


@pytest.mark.parametrize("method", ["none", "hnsw"])
def test_one_row_has_no_neighbour_that_could_be_missed(database: Database, method: str) -> None:
    migrated_with(database, random_rows(1, DIM), OM_INDEX=method)

    found = verify(database, 0)

    assert found["comparison"]["equal"] == 1
    assert (found["search"]["queries"], found["search"]["session"]["recall"]) == (1, None)
    assert found["search"]["session"]["short"] == 0
    assert "-" in om(database, "verify").stdout


def test_bad_rows_alone_are_right_but_hold_no_gate(database: Database) -> None:
    rows = [row._replace(v=pack([float("nan")] * DIM)) for row in random_rows(60, DIM)]
    migrated_with(database, rows)

    found = verify(database, 0)

    assert found["comparison"]["skipped"] == {"NaN or infinite values": 60}
    assert found["not_searched"] == "no row has a vector to ask with"
    assert codes(verify(database, 1, *GATE)) == ["fail-under"]
    assert "no recall to hold against --fail-under 0.9" in om(database, "verify", *GATE).stdout


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_zero_vectors_are_rows_but_no_queries(database: Database, metric: str) -> None:
    zeros = [row._replace(v=bytes(4 * DIM)) for row in random_rows(60, DIM, seed=1)]
    migrated_with(database, zeros, OM_INDEX="hnsw", OM_INDEX_METRIC=metric)
    found = verify(database, 0)
    assert found["comparison"]["equal"] == 60
    assert found["search"] is None

    load(database, random_rows(60, DIM))
    found = verify(database, 0)
    # twelve of each sector, of which some are others' turns
    assert 0 < found["search"]["queries"] <= 60 + 30
    # an index by cosine has no zeros, and they come last
    assert found["search"]["every_row"]["recall"] == 1


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("method", ["ivfflat", "hnsw", "none"])
def test_of_rows_that_are_all_the_same_any_will_do(database: Database, method: str, metric: str) -> None:
    same = random_rows(1, DIM, seed=5)[0].v
    rows = [row._replace(v=same) for row in random_rows(120, DIM)]
    migrated_with(database, rows, OM_INDEX=method, OM_INDEX_METRIC=metric)

    found = verify(database, 0, *GATE)

    assert found["search"]["session"]["recall"] == 1
    assert found["search"]["every_row"]["recall"] == found["search"]["every_row"]["in_memory"] == 1


def test_fewer_rows_of_a_sector_than_are_asked_for_are_not_short(database: Database) -> None:
    rows = [row._replace(sector="reflective" if n < 4 else "semantic") for n, row in enumerate(random_rows(60, DIM))]
    migrated_with(database, rows)  # one list

    found = verify(database, 0, *GATE, "--k", "50")

    groups = found["search"]["session"]["groups"]
    assert {name for name in groups if name.startswith("sector")} == {"sector reflective", "sector semantic"}
    assert groups["sector reflective"]["short"] == 0
    assert groups["sector reflective"]["recall"] == found["search"]["every_row"]["recall"] == 1


def test_sectors_and_users_with_odd_names_or_none(database: Database) -> None:
    names = ['o\'sector \\ "%s" :query {where} 50%', "", *SECTORS[:2]]
    rows = [
        row._replace(sector=names[n % 4], user_id=[None, "a:b", "it's", "", "x" * 500, "\\\\"][n % 6])
        for n, row in enumerate(random_rows(240, DIM))
    ]
    migrated_with(database, rows, OM_INDEX="none")

    found = verify(database, 0, *GATE)

    assert set(found["search"]["session"]["groups"]) == {
        *(f"sector {name}" for name in names),
        "largest users",
        "smallest users",
    }
    assert found["search"]["session"]["recall"] == 1


@pytest.mark.parametrize("kind", ["client_encoding", "SQL_ASCII"])
def test_names_that_the_databases_own_encoding_could_not_show(
    server: embedded.Server, database: Database, kind: str
) -> None:
    """Of rows that are named, too: bad ones."""
    if kind == "SQL_ASCII":
        drop_database(server, database.name)
        options = "TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'"
        Database("postgres", server.url()).run(f"CREATE DATABASE {database.name} {options}")
    else:
        database.run(f"ALTER DATABASE {database.name} SET client_encoding = 'LATIN1'")
    rows = [row._replace(sector="中文", user_id="Müller") for row in random_rows(60, DIM)]
    rows[7] = rows[7]._replace(v=b"\1")
    with closing(database.connect()) as connection:
        connection.set_client_encoding("UTF8")
        with connection.cursor() as cursor:
            cursor.execute(
                f"CREATE TABLE {TABLE} (id uuid, sector text, user_id text, v bytea, dim int, PRIMARY KEY (id, sector))"
            )
            for row in rows:
                cursor.execute(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s, %s)", tuple(row))
        connection.commit()

    done = om(database, "upgrade", env=ENV | {"OM_INDEX": "none"})
    assert (done.returncode, "sector=中文" in done.log) == (0, True)
    found = verify(database, 0, *GATE)
    assert set(found["search"]["session"]["groups"]) >= {"sector 中文"}


def test_a_table_without_a_sector_in_any_row_is_searched_as_a_whole(database: Database) -> None:
    database.run(f"CREATE TABLE {TABLE} (id uuid PRIMARY KEY, sector text, v bytea, dim integer)")
    for row in random_rows(60, DIM):
        database.run(f"INSERT INTO {TABLE} VALUES (%s, NULL, %s, {DIM})", row.id, row.v)
    assert om(database, "upgrade", HEAD).returncode == 0

    found = verify(database, 0)

    assert (found["search"]["queries"], found["search"]["session"]["groups"]) == (60, {})


def test_an_index_by_a_metric_that_nobody_here_knows_is_none(database: Database) -> None:
    migrated_with(database, random_rows(60, DIM), OM_INDEX="none")
    if database.value("SELECT count(*) FROM pg_opclass WHERE opcname = 'vector_l1_ops'") == 0:
        pytest.skip("vector_l1_ops came with pgvector 0.7")
    database.run(f"CREATE INDEX {TABLE}_vvector_idx ON {TABLE} USING hnsw (v_vector vector_l1_ops)")

    found = verify(database, 0, *GATE)

    assert found["index"] is None
    assert codes(found) == ["no-index"]
