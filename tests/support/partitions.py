"""What the tests of partitioned tables share: a tree whose partitions differ in all that they may, and its checks."""

from __future__ import annotations

import uuid
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from tests.support.openmemory import SECTORS, Database, load, mismatches, pack, random_rows
from tests.support.sessions import converted
from tests.support.states import nearest, plan
from tests.support.writers import UPSERT

DIM = 16
ROWS = random_rows(3_000, DIM)
ENV = {"OM_VEC_DIM": str(DIM)}
SLOW = {**ENV, "BACKFILL_BATCH": "25", "OM_BACKFILL_PAUSE_MS": "10"}  # 120 batches, more than a second
engines = pytest.mark.parametrize("engine", ["client", "server", "native"])

ODD = '"epi ""sodic"" 50%:v"'
ELSEWHERE = '"else ""where"": 50 %"'
COLUMNS = "id uuid, sector text, user_id text, v bytea, dim integer NOT NULL"
SHUFFLED = "dim integer NOT NULL, other point, v bytea, sector text NOT NULL, id uuid NOT NULL, user_id text"
# three levels below the root; two partitions of one name; physical columns in three orders
TREE = f"""
CREATE SCHEMA {ELSEWHERE};
CREATE TABLE {TABLE} (old text, {COLUMNS}, PRIMARY KEY (id, sector)) PARTITION BY LIST (sector);
ALTER TABLE {TABLE} DROP old;
CREATE INDEX openmemory_vectors_user_idx ON {TABLE} (user_id);
CREATE TABLE {ODD} PARTITION OF {TABLE} FOR VALUES IN ('episodic');
CREATE TABLE semantic ({SHUFFLED});
ALTER TABLE semantic DROP other;
ALTER TABLE {TABLE} ATTACH PARTITION semantic FOR VALUES IN ('semantic');
CREATE TABLE procedural PARTITION OF {TABLE} FOR VALUES IN ('procedural') PARTITION BY RANGE (id);
CREATE TABLE procedural_low PARTITION OF procedural
FOR VALUES FROM (MINVALUE) TO ('80000000-0000-0000-0000-000000000000');
CREATE TABLE procedural_rest PARTITION OF procedural DEFAULT;
CREATE TABLE {ELSEWHERE}.rest PARTITION OF {TABLE} DEFAULT PARTITION BY HASH (id);
CREATE TABLE {ELSEWHERE}.semantic PARTITION OF {ELSEWHERE}.rest FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE {ELSEWHERE}.deep ({SHUFFLED}) PARTITION BY LIST (sector);
ALTER TABLE {ELSEWHERE}.deep DROP other;
CREATE TABLE {ELSEWHERE}.deepest PARTITION OF {ELSEWHERE}.deep DEFAULT;
ALTER TABLE {ELSEWHERE}.rest ATTACH PARTITION {ELSEWHERE}.deep FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE nothing PARTITION OF {TABLE} FOR VALUES IN ('nothing');
"""
LEAVES = [
    *("nothing", ODD, "procedural_low", "procedural_rest", "semantic"),
    *(f"{ELSEWHERE}.semantic", f"{ELSEWHERE}.deepest"),
]
BAD = [
    row._replace(v=v)
    for row, v in zip(
        random_rows(6, DIM, seed=7),
        [pack([float("nan")] * DIM), pack([1.0]), b"\1\2\3", pack([float("inf")] * DIM), b"", None],
        strict=True,
    )
]


@pytest.fixture
def tree(database: Database) -> Database:
    """The tree with ROWS in it."""
    return filled(database)


def filled(database: Database) -> Database:
    database.run(TREE)
    load(database, ROWS)
    return database


def parents(database: Database) -> dict[str, str | None]:
    """Return every table of the tree with its parent; the root has none."""
    sql = "SELECT relid::regclass::text, parentrelid::regclass::text FROM pg_partition_tree(%s)"
    return dict(database.rows(sql, TABLE))


def leaves(database: Database) -> list[str]:
    return [row[0] for row in database.rows("SELECT relid::text FROM pg_partition_tree(%s) WHERE isleaf", TABLE)]


def vector_indexes(database: Database) -> dict[str, list[tuple[bool, str | None, str]]]:
    """Return for every table of the tree its vector indexes: validity, table of the index that it is attached to,
    options."""
    found: dict[str, list[tuple[bool, str | None, str]]] = {part: [] for part in parents(database)}
    for part, *index in database.rows(
        """
        SELECT x.indrelid::regclass::text, indisvalid AND indisready,
               (SELECT p.indrelid::regclass::text FROM pg_inherits JOIN pg_index p ON p.indexrelid = inhparent
                WHERE inhrelid = c.oid), array_to_string(c.reloptions, ',')
        FROM pg_index x JOIN pg_class c ON c.oid = indexrelid JOIN pg_am am ON am.oid = relam
        WHERE amname IN ('ivfflat', 'hnsw') ORDER BY c.relname
        """
    ):
        found.setdefault(part, []).append(tuple(index))
    return found


def assert_indexed(database: Database) -> None:
    """One valid index on each table of the tree, attached to that of the parent, and a search uses all leaves'."""
    found = {part: [(valid, to) for valid, to, _ in these] for part, these in vector_indexes(database).items()}
    assert found == {part: [(True, parent)] for part, parent in parents(database).items()}
    shown = plan(database, nearest(DIM))
    assert shown.count("Index Scan using ") == len(leaves(database)), shown
    assert "Seq Scan" not in shown


def assert_migrated(database: Database, v: str | None = None) -> None:
    """All rows are converted to the bit, and the index is whole."""
    assert mismatches(database) == []
    assert converted(database) == database.value(f"SELECT count(*) FROM {TABLE}")
    assert_indexed(database)


def assert_followed(database: Database) -> None:
    """Write as the application does, into every leaf and from one to the other; leaves no row."""
    sectors = [*SECTORS, "nothing"]
    ids = [str(uuid.UUID(int=(1 + 4 * n) << 124 | n, version=4)) for n in range(4)] + [
        str(uuid.uuid4()) for _ in range(8)
    ]
    keys = [(id, sector) for id in ids for sector in sectors]
    given = iter(row.v for row in random_rows(6 * len(keys), DIM, seed=11))
    new = f"FROM {TABLE} WHERE user_id LIKE 'new%'"

    with closing(database.connect()) as connection, connection.cursor() as cursor:

        def followed(rows: int) -> None:
            cursor.execute(f"SELECT count(*), count(v_vector), count(DISTINCT tableoid) {new}")
            assert cursor.fetchone() == (rows, rows, len(leaves(database)))
            assert mismatches(database) == []

        for key in keys:
            cursor.execute(UPSERT, (*key, "new", next(given), DIM))
        followed(len(keys))
        for key in keys:
            cursor.execute(f"UPDATE {TABLE} SET v = %s WHERE id = %s AND sector = %s", (next(given), *key))
        followed(len(keys))
        for key in keys:
            cursor.execute(UPSERT, (*key, "new too", next(given), DIM))
        followed(len(keys))
        # each to the next partition, by way of a value that no other row has; first as it is, then with another v
        for more in ("", ", v = %s"):
            for _, (id, sector) in enumerate(keys):
                values = [next(given)] if more else []
                cursor.execute(
                    f"UPDATE {TABLE} SET sector = '-' || sector{more} WHERE id = %s AND sector = %s",
                    [*values, id, sector],
                )
            assert mismatches(database) == []
            for id, sector in keys:
                to = sectors[(sectors.index(sector) + 1) % len(sectors)]
                values = [next(given)] if more else []
                cursor.execute(
                    f"UPDATE {TABLE} SET sector = %s{more} WHERE id = %s AND sector = %s",
                    [to, *values, id, f"-{sector}"],
                )
            followed(len(keys))
        cursor.execute(f"DELETE {new}")


def options(database: Database) -> dict[str, str]:
    """Return the options of each table's only vector index."""
    return {part: one[2] for part, (one,) in vector_indexes(database).items()}
