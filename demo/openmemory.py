"""OpenMemory's own table: its DDL, real rows for it, and checks that ask the database, not the package.

Shared by the demo and the tests.
"""

from __future__ import annotations

import csv
import gzip
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.sql import SQL, Composable, Identifier

from openmemory_migrations.embedded import Server

TABLE = "openmemory_vectors"
FILES = {256: "openmemory_vectors_fast_256.csv.gz", 1536: "openmemory_vectors_deep_1536.csv.gz"}
MAX_DIMENSIONS = 16_000


class Row(NamedTuple):
    id: str
    sector: str
    user_id: str | None
    v: bytes | None
    dim: int


@dataclass(frozen=True)
class Database:
    """One database; every call is a session of its own, so that nothing lingers."""

    name: str
    url: str

    def connect(self) -> Connection:
        connection = psycopg2.connect(self.url)
        connection.autocommit = True
        return connection

    def run(self, sql: str | Composable, *args: Any) -> None:
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(sql, args or None)

    def rows(self, sql: str | Composable, *args: Any) -> list[tuple[Any, ...]]:
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(sql, args or None)
            return cursor.fetchall()

    def value(self, sql: str | Composable, *args: Any) -> Any:
        """Return the first column of the first row."""
        return self.rows(sql, *args)[0][0]


def create_database(server: Server, name: str) -> Database:
    # template0 is the one template in which nobody can have a session
    Database("postgres", server.url()).run(SQL("CREATE DATABASE {} TEMPLATE template0").format(Identifier(name)))
    return Database(name, server.url(name))


def drop_database(server: Server, name: str) -> None:
    Database("postgres", server.url()).run(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))


def environment(database: Database | None, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a deploy pipeline: these settings, and none of the caller's own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OM_", "PG", "BACKFILL_"))}
    return clean | ({"OM_DATABASE_URL": database.url} if database else {}) | dict(settings)


def real_rows(dim: int) -> list[Row]:
    """Return rows that an OpenMemory server wrote, of 256 or 1536 dimensions; see demo/data/README.md."""
    with gzip.open(Path(__file__).parent / "data" / FILES[dim], "rt", newline="") as file:
        return [
            Row(
                row["id"],
                row["sector"],
                row["user_id"],
                bytes.fromhex(row["v"].removeprefix("\\x")),
                int(row["dim"]),
            )
            for row in csv.DictReader(file)
        ]


def create_table(database: Database, table: str = TABLE, schema: str = "public", *, user_id: bool = True) -> None:
    """Create the table as OpenMemory does; 1.2.0 had no `user_id`."""
    name = Identifier(schema, table)
    database.run(SQL("CREATE SCHEMA IF NOT EXISTS {}").format(Identifier(schema)))
    database.run(
        SQL(
            "CREATE TABLE IF NOT EXISTS {}"
            " (id uuid, sector text, {}v bytea, dim integer NOT NULL, PRIMARY KEY (id, sector))"
        ).format(name, SQL("user_id text, " if user_id else ""))
    )
    if user_id:
        database.run(SQL("CREATE INDEX IF NOT EXISTS openmemory_vectors_user_idx ON {} (user_id)").format(name))


def load(
    database: Database,
    rows: Iterable[Row],
    table: str = TABLE,
    schema: str = "public",
    *,
    user_id: bool = True,
) -> None:
    """Copy rows in, a thousand at a time; `user_id=False` for a table without that column."""
    columns = [column for column in Row._fields if user_id or column != "user_id"]
    copy = SQL("COPY {} ({}) FROM STDIN").format(Identifier(schema, table), SQL(", ").join(map(Identifier, columns)))
    left = iter(rows)
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        while batch := list(islice(left, 1000)):
            lines = ("\t".join(_copy_text(getattr(row, column)) for column in columns) + "\n" for row in batch)
            cursor.copy_expert(copy, StringIO("".join(lines)))


def _copy_text(value: object) -> str:
    if value is None:
        return r"\N"
    if isinstance(value, bytes):
        return r"\\x" + value.hex()
    return str(value).replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n")


def checksum(database: Database, table: str = TABLE, column: str = "v", schema: str = "public") -> str:
    """Return one checksum of every row's key and `column`, NULL apart from empty."""
    sql = SQL(
        "SELECT count(*) || ':' || coalesce(md5(string_agg("
        "concat_ws('|', id, sector, coalesce(md5({}::text), 'null')), ',' ORDER BY id, sector)), '') FROM {}"
    )
    return str(database.value(sql.format(Identifier(column), Identifier(schema, table))))


def mismatches(
    database: Database, table: str = TABLE, schema: str = "public", dim: int | None = None
) -> list[tuple[str, str]]:
    """Return the keys of rows whose `v_vector` isn't `v` to the bit, or isn't NULL where `v` is no vector.

    `dim` is what the column should take, by default its own dimension; a column without one takes any.
    """
    name = Identifier(schema, table)
    typmod = "SELECT atttypmod FROM pg_attribute WHERE attrelid = %s::regclass::oid AND attname = 'v_vector'"
    home = "SELECT nspname FROM pg_namespace n, pg_extension e WHERE extnamespace = n.oid AND extname = 'vector'"
    send = SQL("{}.vector_send(v_vector)").format(Identifier(database.value(home)))
    with closing(psycopg2.connect(database.url)) as connection, connection.cursor("rows") as cursor:
        if dim is None:
            dim = database.value(typmod, name.as_string(connection))
        cursor.execute(SQL("SELECT id, sector, v, {} FROM {}").format(send, name))
        # bytes, as psycopg2's memoryviews equal nothing but each other
        return [(id, sector) for id, sector, v, sent in cursor if (sent and bytes(sent)) != expected(v, dim)]


def expected(v: bytes | memoryview | None, dim: int = -1) -> bytes | None:
    """Return pgvector's binary form of `v`, or None where a `vector(dim)` can't hold it; -1 is any dimension.

    int16 dimensions, int16 zero, big-endian float4:
    https://github.com/pgvector/pgvector/blob/v0.8.5/src/vector.c, vector_send
    """
    if v is None or len(v) % 4:
        return None
    values = np.frombuffer(v, "<f4")
    if not 0 < len(values) <= MAX_DIMENSIONS or dim not in (-1, len(values)) or not np.isfinite(values).all():
        return None
    return struct.pack(">HH", len(values), 0) + values.view("<u4").byteswap().tobytes()
