"""Tables of random rows in OpenMemory's form, made once and copied for each measurement, file by file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
from psycopg2.sql import SQL, Identifier

from demo.openmemory import Database, create_database, create_table, drop_database
from openmemory_migrations.embedded import Server

SECTORS = ("episodic", "semantic", "procedural", "emotional", "reflective")
AT_ONCE = 4_000_000  # values
COLUMNS = "COPY openmemory_vectors (id, sector, user_id, v, dim) FROM STDIN"


def make(server: Server, name: str, dimensions: int, rows: int) -> Database:
    """A database with `rows` rows under random keys; nothing compresses them."""
    database = create_database(server, name)
    create_table(database)
    random = np.random.default_rng(dimensions)
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        for start in range(0, rows, step := max(1, AT_ONCE // dimensions)):
            cursor.copy_expert(COLUMNS, io.StringIO("".join(_lines(random, dimensions, min(step, rows - start)))))
        cursor.execute("VACUUM (ANALYZE, FREEZE) openmemory_vectors")
    return database


def _lines(random: np.random.Generator, dimensions: int, rows: int) -> Iterator[str]:
    keys = random.bytes(16 * rows).hex()
    values = random.standard_normal((rows, dimensions), dtype="<f4").tobytes().hex()
    width = 8 * dimensions
    for i in range(rows):
        value = values[i * width : (i + 1) * width]
        yield f"{keys[32 * i : 32 * i + 32]}\t{SECTORS[i % 5]}\tuser-{i % 97}\t\\\\x{value}\t{dimensions}\n"


@contextmanager
def copied(server: Server, template: Database) -> Iterator[Database]:
    """A copy that is like every other one, down to the page."""
    name = f"{template.name}_copy"
    admin = Database("postgres", server.url())
    admin.run(
        SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(Identifier(name), Identifier(template.name))
    )
    try:
        yield Database(name, server.url(name))
    finally:
        drop_database(server, name)
