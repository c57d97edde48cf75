"""After a swap: newer OpenMemory's own statements work, and one that still sends bytes is refused by the server."""

from __future__ import annotations

import struct
from contextlib import closing

import psycopg
import psycopg2
import pytest
from psycopg.adapt import Dumper
from psycopg.pq import Format

from demo.openmemory import TABLE
from tests.support.commands import om
from tests.support.cutover import (
    DIM,
    ROWS,
    bytes_of,
    changed,
    cut_over,
    some_row,
    table,
    text_of,
    undo,
    vectors_of,
    whole,
)
from tests.support.openmemory import Database, mismatches, pack, random_rows
from tests.support.states import INDEX, indexes

__all__ = ["table"]  # a fixture

UPSERT = f"""
INSERT INTO {TABLE} (id, sector, user_id, v, dim, project_id) VALUES (%s, %s, 'user', %s::vector, {DIM}, 'p')
ON CONFLICT (id, sector) DO UPDATE SET user_id = excluded.user_id, v = excluded.v, dim = excluded.dim
"""
STARTS = (
    "CREATE EXTENSION IF NOT EXISTS vector",
    f"ALTER TABLE {TABLE} ADD COLUMN IF NOT EXISTS project_id text",
    f"CREATE INDEX IF NOT EXISTS openmemory_vectors_hnsw_idx ON {TABLE} USING hnsw (v vector_cosine_ops)",
)
NEWER = "openmemory_vectors_hnsw_idx"
UPDATE = f"UPDATE {TABLE} SET v = %s WHERE id = %s AND sector = %s"


@pytest.mark.slow
def test_newer_openmemory_finds_what_it_expects_and_is_followed_back(table: Database) -> None:
    before = bytes_of(table)
    overwritten, _ = some_row()
    new, other = random_rows(2, DIM, seed=21)
    cut_over(table, "swap")
    there = indexes(table)

    for statement in STARTS:
        table.run(statement)
    assert indexes(table) == there
    for row, v in ((new, new.v), (overwritten, other.v), (new, other.v)):
        table.run(UPSERT, row.id, row.sector, text_of(v or b""))
    asked = text_of(ROWS[0].v or b"")
    nearest = f"SELECT id, 1 - (v <=> %s::vector) AS score FROM {TABLE} ORDER BY v <=> %s::vector LIMIT 1"
    ((id, score),) = table.rows(nearest, asked, asked)
    assert (id, round(score, 6)) == (ROWS[0].id, 1)
    ((text,),) = table.rows(f"SELECT v::text FROM {TABLE} WHERE id = %s", new.id)
    assert pack(map(float, text[1:-1].split(","))) == other.v

    # an operator has no use for the bytes any more
    table.run(f"ALTER TABLE {TABLE} DROP COLUMN v_bytea CASCADE")
    undo(table)

    written = {(row.id, row.sector): other.v for row in (new, overwritten)}
    assert bytes_of(table) == before | written
    assert mismatches(table) == []
    assert table.value(f"SELECT project_id FROM {TABLE} WHERE id = %s", new.id) == "p"


@pytest.mark.slow
def test_an_index_that_newer_openmemory_would_make_only_gets_its_name(table: Database) -> None:
    env = {"OM_INDEX": "hnsw", "OM_INDEX_METRIC": "cosine"}
    assert om(table, "index", env=env).returncode == 0
    before = whole(table)
    file = table.value("SELECT pg_relation_filenode(%s)", INDEX)
    cut_over(table, "swap", env)
    assert list(indexes(table)) == [NEWER]
    assert table.value("SELECT pg_relation_filenode(%s)", NEWER) == file
    undo(table)
    assert not changed(before, whole(table))


class Raw(bytes):
    """A buffer that is sent as it is, in binary and without a type, as node-postgres does."""


class RawDumper(Dumper):
    oid = 0
    format = Format.BINARY

    def dump(self, obj: bytes) -> bytes:
        return bytes(obj)


# floats whose bytes could be taken for a vector's head: so many dimensions, and nothing where there is to be nothing
HEADS = {
    "random": None,
    "zeros": (0, "vector must have at least 1 dimension"),
    "one dimension less": (DIM - 1, f"expected {DIM} dimensions, not {DIM - 1}"),
    "as many dimensions": (DIM, "insufficient data left in message"),
}


def test_who_still_sends_bytes_is_refused_and_nothing_is_stored(table: Database) -> None:
    row, _ = some_row()
    v = random_rows(1, DIM, seed=31)[0].v or b""
    key = (row.id, row.sector)
    cut_over(table, "swap")
    before = vectors_of(table)
    said: dict[str, str] = {}

    with closing(table.connect()) as old, old.cursor() as cursor:
        for way, value in {"psycopg2.Binary": psycopg2.Binary(v), "text": "\\x" + v.hex()}.items():
            with pytest.raises(psycopg2.Error) as error:
                cursor.execute(UPDATE, (value, *key))
            said[way] = error.value.diag.message_primary or ""
    with psycopg.connect(table.url, autocommit=True) as connection:
        connection.adapters.register_dumper(Raw, RawDumper)
        buffers: dict[str, object] = {"bytea": v, "random": Raw(v)}
        for name, head in HEADS.items():
            if head:
                buffers[name] = Raw(struct.pack(">hh", head[0], 0) + bytes(4 * (DIM - 1)))
        for way, value in buffers.items():
            for prepare in (True, False):
                with pytest.raises(psycopg.Error) as failed:
                    connection.execute(UPDATE, (value, *key), prepare=prepare)
                said[way] = failed.value.diag.message_primary or ""

    bytea = 'column "v" is of type vector but expression is of type bytea'
    assert said["bytea"] == said["psycopg2.Binary"] == bytea
    # pgvector 0.6 says that it is malformed
    starts = ("invalid input syntax for type vector", "malformed vector literal")
    assert said["text"] in [f'{start}: "\\x{v.hex()}"' for start in starts]
    assert said["random"] == "vector cannot have more than 16000 dimensions"
    for name, head in HEADS.items():
        assert head is None or said[name] == head[1]
    assert vectors_of(table) == before
