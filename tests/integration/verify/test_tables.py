"""`verify` on all kinds of tables: keys of any type or none, odd names, partitions, other columns, many dimensions."""

from __future__ import annotations

import pytest
from psycopg2.sql import SQL, Identifier, Literal

from demo.openmemory import TABLE
from tests.support.commands import om
from tests.support.openmemory import Database, create_table, load, pack, random_rows
from tests.support.partitions import BAD, ENV, LEAVES, tree
from tests.support.partitions import DIM as TREE_DIM
from tests.support.partitions import ROWS as TREE_ROWS
from tests.support.states import BACKFILL, HEAD
from tests.support.verification import UNSEARCHED, behind_its_back, compared, key, verify

__all__ = ["tree"]  # a fixture

DIM = 8
ODD = 'epi "sodic" 50%:v'


def set_up(database: Database, revision: str = BACKFILL, **env: str) -> None:
    done = om(database, "upgrade", revision, env=env)
    assert done.returncode == 0, done.log


# the columns of a primary key, and what they are made of a number
KEYS = {
    "bigint": ("id bigint", "n * 1000000007::bigint"),
    "char(8)": ("id char(8)", "chr(96 + n) || ' '"),
    "timestamp": ("id timestamp", "timestamp '2024-01-07 00:00:00.000001' + n * interval '1 day 1 us'"),
    "timestamptz": ("id timestamptz", "timestamptz '2024-01-07 00:00:00.5+05:30' + n * interval '1 hour'"),
    "uuid and text": ("id uuid, sector text", "gen_random_uuid(), 'se''c:t\"o\\r %s {table} :key0 ' || n"),
    "numeric, bytea": ("id numeric, part bytea", "n / 3.0, decode('00ff5c' || lpad(n::text, 2, '0'), 'hex')"),
    "float8": ("id float8", "n / 3.0::float8"),
    "an enum, a domain": ('id "Mood:s", part positive', "'a:b'::\"Mood:s\", n"),
    "integer[]": ("id integer[]", "ARRAY[n, -n]"),
    "quoted names": ('"the ID:1" integer, "50% {x}" integer', "n, -n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEYS)
def test_rows_are_named_and_found_again_by_keys_of_any_type(database: Database, kind: str) -> None:
    columns, values = KEYS[kind]
    database.run("CREATE TYPE \"Mood:s\" AS ENUM ('a:b'); CREATE DOMAIN positive AS integer CHECK (value > 0)")
    names = ", ".join(column.rpartition(" ")[0] for column in columns.split(", "))
    database.run(f"CREATE TABLE {TABLE} ({columns}, n integer, v bytea, dim integer, PRIMARY KEY ({names}))")
    v = pack([1.0] * DIM).hex()
    database.run(f"INSERT INTO {TABLE} SELECT {values}, n, '\\x{v}', {DIM} FROM generate_series(1, 20) AS n")
    set_up(database)
    with behind_its_back(database):
        database.run(f"UPDATE {TABLE} SET v = %s WHERE n IN (3, 4)", pack([2.0] * DIM))

    found, wrong = compared(database, 1)

    assert (found["rows"], found["equal"], list(wrong)) == (20, 18, ["differs"])
    shown = [name.strip('"') for name in names.split(", ")]
    texts = database.rows(
        SQL("SELECT {} FROM {} WHERE n IN (3, 4)").format(
            SQL(", ").join(SQL("CAST({} AS text)").format(Identifier(name)) for name in shown), Identifier(TABLE)
        )
    )
    pairs = [", ".join(f"{name}={value}" for name, value in zip(shown, row, strict=True)) for row in texts]
    assert wrong["differs"] == sorted(f"({pair})" for pair in pairs)


@pytest.mark.slow
def test_a_table_without_primary_key_names_places(database: Database) -> None:
    database.run(f"CREATE TABLE {TABLE} (id uuid, sector text, user_id text, v bytea, dim integer)")
    load(database, random_rows(60, DIM))
    set_up(database, HEAD)
    verify(database, 0, "--queries", "10")
    with behind_its_back(database):
        database.run(f"UPDATE {TABLE} SET v = %s WHERE user_id = 'user7'", pack([2.0] * DIM))
    places = database.rows(f"SELECT ctid::text FROM {TABLE} WHERE user_id = 'user7'")

    _, wrong = compared(database, 1)

    assert wrong == {"differs": sorted(f"(ctid={place})" for (place,) in places)}


@pytest.mark.slow
def test_a_column_without_dimensions_holds_vectors_of_several(database: Database) -> None:
    create_table(database)
    set_up(database)
    rows = [row for size in (1, 3, 8, 2100) for row in random_rows(30, size)]
    load(database, rows)
    bad = [row._replace(v=v) for row, v in zip(random_rows(2, 5), [b"\1\2", pack([float("inf")] * 5)], strict=True)]
    load(database, bad)

    found = verify(database, 0)

    assert found["not_searched"] == "the vectors have different dimensions"
    assert (found["comparison"]["rows"], found["comparison"]["equal"]) == (122, 120)
    assert found["comparison"]["skipped"] == {"length not a multiple of 4": 1, "NaN or infinite values": 1}
    with behind_its_back(database):
        for row, v in [(rows[0], pack([1.0, 2.0])), (rows[40], rows[41].v), (rows[70], b"")]:
            database.run(f"UPDATE {TABLE} SET v = %s WHERE id = %s", v, row.id)
        database.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE id = %s", rows[100].id)
    _, wrong = compared(database, 1)
    assert wrong == {
        "stale": sorted([key(rows[0]), key(rows[70])]),
        "differs": [key(rows[40])],
        "missing": [key(rows[100])],
    }


@pytest.mark.parametrize("sample", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_partitions_are_compared_leaf_by_leaf(tree: Database, sample: bool) -> None:
    more = [row._replace(sector="nothing") for row in random_rows(2500, TREE_DIM, seed=3)]
    load(tree, [*BAD, *more])
    set_up(tree, HEAD, **ENV)
    if sample:
        found = verify(tree, 0, *UNSEARCHED, "--sample", "300")["comparison"]
        assert found["sampled"] is True
        assert 100 <= found["rows"] < 1500
        return
    found = verify(tree, 0, "--queries", "10")
    assert found["comparison"]["equal"] == len(TREE_ROWS) + len(more)
    assert sum(found["comparison"]["skipped"].values()) == 5
    # each leaf has lists of its own, and the most of them is how far probes go
    lists = "SELECT max(substr(o, 7)::integer) FROM pg_class, unnest(reloptions) o WHERE o LIKE 'lists=%'"
    assert tree.value(lists) == 2
    assert found["search"]["tried"][-1]["settings"] == {"ivfflat.probes": "2"}
    assert found["search"]["tried"][-1]["recall"] == 1
    wrong = []
    for leaf in LEAVES:
        for id, sector in tree.rows(
            SQL("SELECT id, sector FROM {} WHERE v_vector IS NOT NULL LIMIT 2").format(SQL(leaf))
        ):
            wrong.append(f"(id={id}, sector={sector})")
            tree.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE id = %s AND sector = %s", id, sector)

    assert compared(tree, 1)[1] == {"missing": sorted(wrong)}
    assert len(wrong) >= 2 * (len(LEAVES) - 1)


@pytest.mark.slow
def test_another_schema_other_columns_and_the_extension_elsewhere(database: Database) -> None:
    schema, column, vector = 'app "s": 5%', "embedding:a", "embedding %s {v}"
    names = {
        "schema": Identifier(schema),
        "table": Identifier(schema, ODD),
        "column": Identifier(column),
        "vector": Identifier(vector),
        "bytes": Literal(pack(range(1, 9))),
    }
    for sql in (
        "CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext; CREATE SCHEMA {schema}",
        "CREATE TABLE {table} (id integer PRIMARY KEY, sector integer, {column} bytea)",
        "INSERT INTO {table} SELECT n, n, {bytes} FROM generate_series(1, 100) AS n",
        "ALTER TABLE {table} ADD {vector} ext.vector(8)",
        "COMMENT ON COLUMN {table}.{vector} IS 'openmemory_migrations: kept equal to embedding:a'",
    ):
        database.run(SQL(sql).format(**names))
    args = ("--column", column, "--vector-column", vector, "-x", f"pg_schema={schema}", "-x", f"vector_table={ODD}")
    without = {"OM_SYNC_TRIGGER": "off"}
    done = om(database, "backfill", *args, env=without)
    assert done.returncode == 0, done.log

    found = verify(database, 0, *args, "--queries", "10", env=without)

    assert found["table"] == f"{schema}.{ODD}"
    assert found["comparison"]["equal"] == 100
    # in a host's table a column of that name isn't OpenMemory's
    assert set(found["search"]["every_row"]["groups"]) == set()
    assert found["search"]["every_row"]["recall"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hnsw", "ivfflat"])
def test_above_2000_dimensions_the_search_is_the_halfvec_indexs(database: Database, method: str) -> None:
    create_table(database)
    load(database, random_rows(200, 2100))
    set_up(database, HEAD, OM_INDEX=method)

    found = verify(database, 0, "--queries", "10", "--fail-under", "0.3")

    search = found["search"]
    assert found["index"]["opclass"] == "halfvec_l2_ops"
    assert found["comparison"]["equal"] == 200
    assert search["session"]["by_index"] == search["queries"]
    assert max(one["recall"] for one in search["tried"]) > 0.9
