"""What the tests of the cutover share: a table at the chain's head, the commands, and all that could have changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import pytest
from psycopg2.sql import SQL, Composed, Identifier

from demo.openmemory import TABLE
from tests.support.commands import NOTHING, Result, alembic
from tests.support.databases import Databases
from tests.support.openmemory import (
    Database,
    Row,
    create_table,
    load,
    pack,
    random_rows,
)
from tests.support.states import State, refused, snapshot
from tests.support.writers import Key

UP, DOWN = ("-n", "cutover", "upgrade", "head"), ("-n", "cutover", "downgrade", "base")
UNDO = "alembic -n cutover downgrade base"
STAMP, VERSION_TABLE = "om_20240109_cutover", "openmemory_cutover_version"
MODES = ("swap", "drop")
both_modes = pytest.mark.parametrize("mode", MODES)
DIM = 16
ROWS = random_rows(300, DIM)
BAD = [
    row._replace(v=v)
    for row, v in zip(
        random_rows(5, DIM, seed=7), [pack([float("nan")] * DIM), pack([1.0]), b"\1\2\3", b"", None], strict=True
    )
]
LOSS = 4  # of BAD have bytes
Values = dict[Key, bytes | None]


def at_head(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head")


@pytest.fixture
def table(databases: Databases) -> Iterator[Database]:
    """ROWS at the chain's head."""
    with databases.copy(at_head) as database:
        yield database


def cut_over(database: Database, mode: str, env: Mapping[str, str] = NOTHING) -> Result:
    return alembic(database, *UP, env={"OM_CUTOVER": mode, **env})


def undo(database: Database, env: Mapping[str, str] = NOTHING) -> Result:
    return alembic(database, *DOWN, env=env)


def stamped(database: Database, schema: str = "public") -> list[str] | None:
    """What the cutover's version table says, None where there is none."""
    if database.value("SELECT to_regclass(format('%%I.%%I', %s, %s))", schema, VERSION_TABLE) is None:
        return None
    return [
        row[0] for row in database.rows(SQL("SELECT version_num FROM {}").format(Identifier(schema, VERSION_TABLE)))
    ]


def whole(database: Database) -> State:
    """The snapshot without the cutover's version table, the order of columns, and bytes that depend on it."""
    state = {
        what: [row for row in rows if not any(str(part).startswith(VERSION_TABLE) for part in row)]
        for what, rows in snapshot(database).items()
    }
    state["columns"] = sorted((_column(*row) for row in state["columns"]), key=repr)
    state["beside"] = database.rows(
        """
        SELECT attrelid::regclass::text, attname, attcompression::text, attstattarget
        FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace
        WHERE nspname !~ '^(pg_|information_schema$)' AND relkind IN ('r', 'p') AND relname <> ALL (%s)
          AND attnum > 0 AND NOT attisdropped ORDER BY 1, 2
        """,
        [VERSION_TABLE, "openmemory_alembic_version"],
    )
    state["rows"] = [_rows(database, *row[:2]) for row in state["rows"]]
    return state


def _column(schema: str, table: str, _: int, *row: Any) -> tuple[Any, ...]:
    """Without its place, and without the order of its privileges."""
    name, type_, not_null, storage, privileges, *rest = row
    return schema, table, name, type_, not_null, storage, privileges and sorted(privileges[1:-1].split(",")), *rest


def _rows(database: Database, schema: str, table: str) -> tuple[str, str, int, str]:
    columns = database.rows(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(format('%%I.%%I', %s, %s)) AND attnum > 0"
        " AND NOT attisdropped ORDER BY 1",
        schema,
        table,
    )
    row: Composed = SQL("ROW({})::text").format(SQL(", ").join(Identifier(name) for (name,) in columns))
    sql = SQL("SELECT count(*), md5(string_agg({0}, ',' ORDER BY {0})) FROM {1}").format(row, Identifier(schema, table))
    ((rows, digest),) = database.rows(sql)
    return schema, table, rows, digest


def changed(before: State, after: State) -> dict[str, object]:
    """What differs, for each kind of thing; empty where nothing does."""
    return {
        what: (
            [row for row in before[what] if row not in after[what]],
            [row for row in after[what] if row not in before[what]],
        )
        for what in before
        if before[what] != after[what]
    }


def refuses(database: Database, *said: str, mode: str = "swap", env: Mapping[str, str] = NOTHING) -> Result:
    """The cutover is refused with all that is said, nothing is changed, and it isn't stamped, if it wasn't before."""
    stamp = stamped(database)
    result = refused(database, *said, command=UP, env={"OM_CUTOVER": mode, **env})
    assert stamped(database) == stamp, result.log
    return result


def bytes_of(database: Database, column: str = "v", table: str = TABLE) -> Values:
    rows = database.rows(SQL("SELECT id, sector, {} FROM {}").format(Identifier(column), Identifier(table)))
    return {(id, sector): v if v is None else bytes(v) for id, sector, v in rows}


def vectors_of(database: Database, column: str = "v", table: str = TABLE) -> Values:
    """What pgvector sends of them."""
    sql = SQL("SELECT id, sector, vector_send({}) FROM {}").format(Identifier(column), Identifier(table))
    return {(id, sector): v if v is None else bytes(v) for id, sector, v in database.rows(sql)}


def text_of(v: bytes) -> str:
    """A vector as newer OpenMemory writes it; exact, as float32's shortest digits are."""
    import numpy as np

    return "[" + ",".join(map(str, np.frombuffer(v, "<f4"))) + "]"


def some_row(rows: list[Row] = ROWS) -> tuple[Row, str]:
    """One of them, with what finds it."""
    row = rows[len(rows) // 2]
    return row, f"id = '{row.id}' AND sector = '{row.sector}'"


def settings(database: Database, *statements: str) -> None:
    """Run statements in one session."""
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def quoted(role: Identifier) -> str:
    return '"' + role.string.replace('"', '""') + '"'


@contextmanager
def roles(database: Database) -> Iterator[list[Identifier]]:
    """Two of the whole server's, with names that no other database uses."""
    made = [Identifier(f'{kind} of "{database.name}" 50%:x') for kind in ("reader", "other")]
    for role in made:
        database.run(SQL("CREATE ROLE {}").format(role))
    yield made
    for role in made:
        if database.value("SELECT to_regrole(%s)", quoted(role)):
            database.run(SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))
