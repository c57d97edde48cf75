"""What has to hold before a table is cut over: each refusal says what is missing, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.commands import alembic
from tests.support.cutover import (
    BAD,
    DIM,
    LOSS,
    ROWS,
    UP,
    changed,
    cut_over,
    refuses,
    stamped,
    table,
    undo,
    whole,
)
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.states import INDEX, INVALIDATE, column_type, refused
from tests.support.verification import behind_its_back, set_both, set_v

__all__ = ["table"]  # a fixture

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

SYNC = f"{TABLE}_vvector_sync"
BESIDE = {
    f"CREATE VIEW seen AS SELECT v FROM {TABLE}": "rule _RETURN on view public.seen",
    f"CREATE INDEX digest ON {TABLE} (md5(v))": "index public.digest",
    f"ALTER TABLE {TABLE} ADD size int GENERATED ALWAYS AS (octet_length(v)) STORED": "column size of",
    f"ALTER TABLE {TABLE} ADD CONSTRAINT most CHECK (octet_length(v) < 9999)": "constraint most",
    f"CREATE TRIGGER theirs BEFORE UPDATE OF v ON {TABLE} EXECUTE FUNCTION a_function()": "trigger theirs",
}
BROKEN = {
    "the trigger is disabled": (
        f"ALTER TABLE {TABLE} DISABLE TRIGGER {SYNC}",
        f'trigger "{SYNC}" of "public.{TABLE}" is missing or disabled',
    ),
    "the trigger is for replicas only": (
        f"ALTER TABLE {TABLE} ENABLE REPLICA TRIGGER {SYNC}",
        f'trigger "{SYNC}" of "public.{TABLE}" is missing or disabled',
    ),
    "the index is invalid": (INVALIDATE, f'no valid index on "v_vector" of "public.{TABLE}"'),
    "the column has no dimensions": (
        f"DROP INDEX {INDEX}; ALTER TABLE {TABLE} ALTER v_vector TYPE vector",
        f'column "v_vector" of "public.{TABLE}" has no dimensions',
    ),
    "there is a column of that name": (
        f"ALTER TABLE {TABLE} ADD v_bytea text",
        f'"public.{TABLE}" has a column "v_bytea" already',
    ),
    "there is a table of that name": (
        f"CREATE VIEW {TABLE}_v_kept AS SELECT 1 AS one",
        f"the name \"{TABLE}_v_kept\" is taken by something that isn't this package's",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_something_is_missing_or_in_the_way(table: Database, broken: str) -> None:
    statement, said = BROKEN[broken]
    table.run(statement)
    refuses(table, said)


def test_what_hangs_on_the_column_is_listed(table: Database) -> None:
    table.run("CREATE FUNCTION a_function() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    for statement in BESIDE:
        table.run(statement)
    refuses(table, f'what hangs on "v" of "public.{TABLE}" would not go over', *BESIDE.values(), mode="drop")


def test_rows_that_are_wrong_are_counted_and_named(table: Database) -> None:
    differing, pending, stale = random_rows(3, DIM, seed=5)
    load(table, [differing, pending, stale])
    v = differing.v or b""
    set_both(table, differing, v, bytes([v[0] ^ 1]) + v[1:])
    table.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE id = %s", pending.id)
    with behind_its_back(table):
        set_v(table, stale, b"\1\2\3")

    refuses(
        table,
        f'3 rows of "public.{TABLE}" are not right, so nothing is cut over',
        f"1: the vector is another than the bytes, such as (id={differing.id}, sector={differing.sector})",
        f"1: the bytes have no vector, such as (id={pending.id}, sector={pending.sector})",
        f"1: there is a vector, but the bytes are none (any more), such as (id={stale.id}, sector={stale.sector})",
        'UPDATE … SET "v" = "v" for those rows',
        "openmemory-migrations backfill converts them",
        env={"OM_INDEX": "none"},  # or newer OpenMemory's would be there for the next run
    )


def test_bytes_that_no_vector_can_hold_are_accepted_by_their_number_only(table: Database) -> None:
    load(table, BAD)
    said = f'{LOSS} rows of "public.{TABLE}" have bytes that no vector can hold'
    refuses(table, said, "NaN or infinite values: 1", f"OM_ACCEPT_LOSS={LOSS}")
    refuses(table, said, "OM_ACCEPT_LOSS says 5.", env={"OM_ACCEPT_LOSS": "5"})


def test_no_index_is_needed_where_there_is_to_be_none(table: Database) -> None:
    table.run(f"DROP INDEX {INDEX}")
    before = whole(table)
    cut_over(table, "swap", env={"OM_INDEX": "none"})
    undo(table)
    assert not changed(before, whole(table))


@pytest.mark.parametrize("rows", [0, 3])
def test_a_table_too_small_for_an_index_is_cut_over(database: Database, rows: int) -> None:
    create_table(database)
    load(database, ROWS[:rows])
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})
    before = whole(database)
    cut_over(database, "swap")
    assert column_type(database, "v") == f"vector({DIM})"
    undo(database)
    assert not changed(before, whole(database))


@pytest.fixture
def other(server: Server, table: Database) -> Iterator[Database]:
    name = f"other of {table.name}"
    table.run(SQL("CREATE ROLE {0} LOGIN; GRANT CREATE ON SCHEMA public TO {0}").format(Identifier(name)))
    table.run(SQL("GRANT SELECT, UPDATE ON {} TO {}").format(Identifier(TABLE), Identifier(name)))
    yield Database(table.name, server.url(table.name, user=name))
    table.run(SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(Identifier(name)))


def test_the_table_has_to_be_ones_own(table: Database, other: Database) -> None:
    refused(table, f'does not own table "public.{TABLE}"', command=UP, env={"OM_CUTOVER": "swap"}, by=other)
    table.run(SQL("ALTER TABLE {} OWNER TO {}").format(Identifier(TABLE), Identifier(f"other of {table.name}")))
    function = f'"public"."{TABLE}_vvector_sync"()'
    said = f'function {function} belongs to "postgres"'
    refused(table, said, command=UP, env={"OM_CUTOVER": "swap"}, by=other)
    assert stamped(table) is None
