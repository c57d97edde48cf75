"""What the tests of newer OpenMemory's tables share: its statements, a table with rows, what has to be in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import psycopg

from demo.openmemory import TABLE
from tests.support.openmemory import Database, Row, expected, load
from tests.support.states import snapshot
from tests.support.states import stamp as stamped
from tests.support.writers import Key, Writer

INDEX = "openmemory_vectors_hnsw_idx"
NEWER = f"""
CREATE TABLE IF NOT EXISTS {TABLE} (id uuid, sector text, user_id text, project_id text, v vector, dim integer NOT NULL,
                                    PRIMARY KEY (id, sector))
"""
START = f"CREATE INDEX IF NOT EXISTS {INDEX} ON {TABLE} USING hnsw (v vector_cosine_ops)"
UPSERT = f"""
INSERT INTO {TABLE} (id, sector, user_id, project_id, v, dim) VALUES (%s, %s, %s, %s, %s::vector, %s)
ON CONFLICT (id, sector) DO UPDATE SET user_id = EXCLUDED.user_id, v = EXCLUDED.v, dim = EXCLUDED.dim
"""
SEARCH = f"SELECT id, 1 - (v <=> %s::vector) FROM {TABLE} WHERE sector = %s ORDER BY v <=> %s::vector LIMIT 5"


def text(v: bytes | None) -> str | None:
    """Return the vector as the application writes it, exact to the bit."""
    return None if v is None else "[" + ",".join(map(str, np.frombuffer(v, "<f4"))) + "]"


def create_newer(database: Database, rows: Sequence[Row] = (), sql: str = NEWER, schema: str = "public") -> None:
    database.run(f"CREATE EXTENSION IF NOT EXISTS vector; {sql}")
    # as COPY takes it, `v` is the text of a vector here, where a Row has bytes
    load(database, (row._replace(v=text(row.v)) for row in rows), schema=schema)  # type: ignore[arg-type]


def wrong(database: Database, rows: Sequence[Row] | dict[Key, bytes | None], column: str = "v") -> list[Key]:
    """Return the keys of rows that aren't as they have to be, to the bit, or aren't there, or shouldn't be."""
    wanted = rows if isinstance(rows, dict) else {(row.id, row.sector): row.v for row in rows}
    found = {
        (id, sector): sent and bytes(sent)
        for id, sector, sent in database.rows(f"SELECT id, sector, vector_send({column}) FROM {TABLE}")
    }
    return [key for key in wanted.keys() | found.keys() if key not in found or found[key] != expected(wanted.get(key))]


def filenode(database: Database) -> int:
    return int(database.value("SELECT pg_relation_filenode(%s)", TABLE))


def end(database: Database) -> object:
    """Everything but where in the table the rows lie."""
    return snapshot(database), stamped(database)


class NewerWriter(Writer):
    """By the statements of newer OpenMemory, which are prepared after a while."""

    def run(self) -> None:
        try:
            with psycopg.connect(self._database.url, autocommit=True) as connection, connection.cursor() as cursor:
                while not self.stopping.is_set():
                    self._write(cursor)  # type: ignore[arg-type]
        except BaseException as error:
            self.error = error

    def _upsert(self, cursor: psycopg.Cursor, key: Key) -> None:  # type: ignore[override]
        v = self._value()
        self._timed(cursor, UPSERT, *key, "user1", "project1", text(v), self._dim)  # type: ignore[arg-type]
        self.rows[key] = v

    def _update_v(self, cursor: psycopg.Cursor, key: Key) -> None:  # type: ignore[override]
        v = self._value()
        sql = f"UPDATE {TABLE} SET v = %s::vector WHERE id = %s AND sector = %s"
        self._timed(cursor, sql, text(v), *key)  # type: ignore[arg-type]
        if key in self.rows:
            self.rows[key] = v
        self._read(cursor, key)

    def _read(self, cursor: psycopg.Cursor, key: Key) -> None:
        asked = text(self._random.choice(self._good))
        self._timed(cursor, SEARCH, asked, key[1], asked)  # type: ignore[arg-type]
        cursor.execute(f"SELECT v::text FROM {TABLE} WHERE id = %s AND sector = %s", key)
        seen = [np.array(one[1:-1].split(","), "<f4").tobytes() if one else None for (one,) in cursor]
        assert seen == ([self.rows[key]] if key in self.rows else []), f"{key} was read wrongly"

    def _value(self) -> bytes | None:
        return None if self._random.random() < 0.02 else self._random.choice(self._good)


def typed(database: Database) -> int:
    """Return how many rows have their vector in the column that is to take the place of `v`."""
    column = "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'v_typed'"
    return int(database.value(column, TABLE) and database.value(f"SELECT count(v_typed) FROM {TABLE}"))
