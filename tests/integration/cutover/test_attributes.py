"""What a column has beside its values goes where the application looks for it, and comes back; nothing is rewritten."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from psycopg2.sql import SQL, Identifier, Literal

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.cutover import (
    DOWN,
    ROWS,
    STAMP,
    both_modes,
    changed,
    cut_over,
    quoted,
    roles,
    stamped,
    table,
    undo,
    vectors_of,
    whole,
)
from tests.support.host_init import init
from tests.support.openmemory import Database, checksum, create_table, expected, load
from tests.support.roles import owner
from tests.support.servers import CHOICE, programs
from tests.support.states import State, indexes, refused, without_extension

__all__ = ["owner", "table"]  # fixtures

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

SCHEMA, ODD = 'my "schema"', "odd ;table' 50%:x"
ENV = {"OM_PG_SCHEMA": SCHEMA, "OM_VECTOR_TABLE": ODD}
COMMENT = "50 % of :all 'bytes' {v} \"é\""
BESIDE = """
ALTER TABLE {table} ALTER v SET NOT NULL, ALTER v SET DEFAULT '\\x00'::bytea, ALTER v SET STORAGE EXTERNAL,
  ALTER v SET STATISTICS 77, ALTER v_vector SET STATISTICS 55;
COMMENT ON COLUMN {table}.v IS {comment};
GRANT SELECT (v), UPDATE (v) ON {table} TO {reader} WITH GRANT OPTION;
GRANT SELECT (v) ON {table} TO PUBLIC;
GRANT SELECT (v_vector, v), INSERT (v_vector) ON {table} TO {other};
"""
ACL = """
SELECT coalesce(g.grantee::regrole::text, ''), privilege_type, is_grantable
FROM pg_attribute, aclexplode(attacl) g WHERE attrelid = format('%%I.%%I', %s, %s)::regclass AND attname = %s
"""
REQUIRED = """
SELECT attname FROM pg_attribute WHERE attrelid = format('%%I.%%I', %s, %s)::regclass AND attnotnull
"""
FILES = (
    "SELECT relname, pg_relation_filenode(oid) FROM pg_class WHERE relkind IN ('r','i') AND relname !~ '^pg_|cutover'"
)


COLUMNS = 'schema="public", table="chunks", column="embedding", vector_column="embedding_vector"'
FIRST = f"""
from openmemory_migrations import ops
revision = "h1"
down_revision = None
def upgrade(**kw):
    ops.upgrade_expand({COLUMNS})
    ops.upgrade_backfill({COLUMNS})
    ops.upgrade_finalize({COLUMNS})
def downgrade(**kw):
    ops.downgrade_finalize({COLUMNS})
    ops.downgrade_expand({COLUMNS})
"""
SECOND = f"""
from openmemory_migrations import ops
revision = "h2"
down_revision = "h1"
def upgrade(**kw):
    ops.upgrade_cutover({COLUMNS}, cutover="swap")
def downgrade(**kw):
    ops.downgrade_cutover({COLUMNS})
"""


def privileges(database: Database, column: str) -> set[tuple[str, str, bool]]:
    return set(database.rows(ACL, SCHEMA, ODD, column))


def _but_versions(state: State) -> State:
    return {what: [row for row in rows if "alembic_version" not in repr(row)] for what, rows in state.items()}


@both_modes
def test_what_a_column_has_beside_its_values_goes_over_and_comes_back(database: Database, mode: str) -> None:
    database.run(SQL("CREATE SCHEMA {}").format(Identifier(SCHEMA)))
    create_table(database, ODD, SCHEMA)
    load(database, ROWS, ODD, SCHEMA)
    alembic(database, "upgrade", "head", env=ENV)
    with roles(database) as (reader, other):
        names = {"table": Identifier(SCHEMA, ODD), "reader": reader, "other": other, "comment": Literal(COMMENT)}
        database.run(SQL(BESIDE).format(**names))
        before, files = whole(database), dict(database.rows(FILES))
        of_v, of_vector = privileges(database, "v"), privileges(database, "v_vector")
        assert (len(of_v), len(of_vector)) == (4, 2)

        cut_over(database, mode, ENV)

        now = dict(database.rows(FILES))
        assert {name: now[name] for name in files} == files
        assert stamped(database, SCHEMA) == [STAMP]
        assert stamped(database) is None
        if mode == "swap":
            assert privileges(database, "v") == of_v
            assert privileges(database, "v_bytea") == of_vector
            required = {name for (name,) in database.rows(REQUIRED, SCHEMA, ODD)}
            assert "v" in required
            assert "v_bytea" not in required
        undo(database, ENV)
        assert not changed(before, whole(database))


@both_modes
def test_what_the_vectors_have_of_their_own_stays(table: Database, mode: str) -> None:
    """A NOT NULL and a default that are not from the bytes."""
    zeros = f"[{','.join('0' * 8)}]"
    table.run(f"DELETE FROM {TABLE} WHERE v_vector IS NULL")
    table.run(f"ALTER TABLE {TABLE} ALTER v_vector SET NOT NULL, ALTER v_vector SET DEFAULT '{zeros}'")
    before = whole(table)

    cut_over(table, mode)

    column = "v" if mode == "swap" else "v_vector"
    there = (
        "SELECT is_nullable, column_default FROM information_schema.columns WHERE table_name = %s AND column_name = %s"
    )
    assert table.rows(there, TABLE, column) == [("NO", f"'{zeros}'::vector")]
    undo(table)
    assert not changed(before, whole(table))


def test_a_role_that_is_no_more_does_not_keep_the_bytes_from_coming_back(table: Database) -> None:
    v = checksum(table)
    with roles(table) as (gone, still):
        table.run(SQL("GRANT SELECT (v) ON {} TO {}, {}").format(Identifier(TABLE), gone, still))
        cut_over(table, "drop")
        table.run(SQL("DROP ROLE {}").format(gone))

        assert f"there is no role {quoted(gone)} any more" in undo(table).log

        assert checksum(table) == v
        assert table.rows(ACL, "public", TABLE, "v") == [(quoted(still), "SELECT", False)]


def test_a_column_of_a_hosts_goes_over_by_ops(tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, history={"h1": FIRST, "h2": SECOND})
    for name in ("chunks", "raw"):
        create_table(database, name)
    database.run("ALTER TABLE chunks RENAME v TO embedding; ALTER TABLE chunks DROP dim")
    load(database, ROWS, "raw")
    database.run("INSERT INTO chunks SELECT id, sector, user_id, v FROM raw")
    database.run("DROP TABLE raw")
    beginning = without_extension(whole(database))
    host.alembic("upgrade", "h1")
    before = _but_versions(whole(database))

    log = host.alembic("upgrade", "head").log

    assert '"embedding" is the vector, the bytes are "embedding_bytea"' in log
    assert vectors_of(database, "embedding", "chunks") == {(row.id, row.sector): expected(row.v) for row in ROWS}
    # newer OpenMemory's index is for its own table only
    assert list(indexes(database, "chunks")) == ["chunks_embedding_vector_idx"]
    host.alembic("downgrade", "h1")
    assert not changed(before, _but_versions(whole(database)))
    host.alembic("upgrade", "head")
    host.alembic("downgrade", "base")
    assert not changed(beginning, _but_versions(without_extension(whole(database))))


def test_a_default_that_names_a_function_is_that_of_the_partitions_too(database: Database) -> None:
    create_table(database)
    database.run(
        "CREATE FUNCTION dv() RETURNS bytea LANGUAGE sql AS $$ SELECT '\\x00'::bytea $$;"
        f"ALTER TABLE {TABLE} ALTER v SET DEFAULT dv(); ALTER TABLE {TABLE} RENAME TO plain;"
        f" CREATE TABLE {TABLE} (LIKE plain INCLUDING DEFAULTS) PARTITION BY HASH (id);"
        f" CREATE TABLE one PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
    )
    load(database, ROWS)
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
    cut_over(database, "swap", {"OM_INDEX": "none"})
    undo(database)


def test_a_default_keeps_the_function_that_it_calls(database: Database) -> None:
    """Whichever else of that name is nearer, when the cutover runs or when it is undone."""
    create_table(database)
    load(database, ROWS)
    for schema in ("app", "public"):
        database.run(
            f"CREATE SCHEMA IF NOT EXISTS {schema};"
            f" CREATE FUNCTION {schema}.dv() RETURNS bytea LANGUAGE sql AS $$ SELECT '\\x00'::bytea $$"
        )
    database.run(
        f"ALTER TABLE {TABLE} ALTER v SET DEFAULT app.dv(); ALTER DATABASE {database.name} SET search_path = app"
    )
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
    cut_over(database, "drop", {"OM_INDEX": "none"})
    database.run(f"ALTER DATABASE {database.name} RESET search_path")
    undo(database)
    assert (
        database.value(f"SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = 'public.{TABLE}'::regclass")
        == "app.dv()"
    )


@pytest.mark.parametrize(("there", "back"), [("on", "off"), ("off", "on")])
@both_modes
def test_a_default_means_the_same_under_whichever_setting_it_was_read(
    table: Database, mode: str, there: str, back: str
) -> None:
    def under(setting: str) -> None:
        name = Identifier(table.name)
        table.run(SQL("ALTER DATABASE {} SET standard_conforming_strings = %s").format(name), setting)

    table.run(f"ALTER TABLE {TABLE} ALTER v SET DEFAULT E'\\\\x015c02'::bytea")
    read = f"SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = '{TABLE}'::regclass"
    before = table.rows(read)

    under(there)
    cut_over(table, mode)
    under(back)
    undo(table)

    under("on")
    assert table.rows(read) == before


@pytest.mark.parametrize(
    "other",
    [
        {"source": {"storage": "?"}},
        {"source": {"statistics": "many"}},
        {"source": {"grants": [["x", "ALL; --", True]]}},
        {"parts": []},
        {"renamed": 5},
    ],
)
def test_a_mark_that_somebody_has_changed_is_named(table: Database, other: dict[str, object]) -> None:
    cut_over(table, "drop")
    comment = f"SELECT col_description('{TABLE}'::regclass, attnum) FROM pg_attribute WHERE attname = 'v_vector'"
    mark = f"{comment} AND attrelid = '{TABLE}'::regclass"
    start, _, data = table.value(mark).partition("{")
    found = json.loads("{" + data)
    for name, value in other.items():
        found[name] = found[name] | value if isinstance(value, dict) else value
    text = Literal(start + json.dumps(found))
    table.run(SQL(f"COMMENT ON COLUMN {TABLE}.v_vector IS {{}}").format(text))

    refused(table, "isn't what the cutover has put there", command=DOWN)


def dumped(database: Database) -> set[str]:
    """The lines of a dump of the schema, whose columns may have another order."""
    command = [str(programs() / "pg_dump"), "--schema-only", f"--table={TABLE}", database.url]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {line.strip().rstrip(",") for line in done.stdout.splitlines() if not line.startswith(("--", "\\"))}


HANDED_ON = (
    f"DELETE FROM {TABLE} WHERE v IS NULL; ALTER TABLE {TABLE} ALTER v SET (n_distinct = -0.5)",
    f"ALTER TABLE {TABLE} ALTER v SET STATISTICS 77, ALTER v SET COMPRESSION pglz, ALTER v SET DEFAULT '\\x00'",
    f'ALTER TABLE {TABLE} ADD CONSTRAINT "its must" ' + ("NOT NULL v" if CHOICE == "18" else "CHECK (dim > 0)"),
    f"COMMENT ON CONSTRAINT \"its must\" ON {TABLE} IS 'it''s \\why'",
    f"GRANT SELECT (v), UPDATE (v) ON {TABLE} TO {{a}} WITH GRANT OPTION; GRANT SELECT (v) ON {TABLE} TO PUBLIC",
    f"SET ROLE {{a}}; GRANT SELECT (v) ON {TABLE} TO {{b}} WITH GRANT OPTION",
    f"SET ROLE {{b}}; GRANT SELECT (v) ON {TABLE} TO postgres",
    f"GRANT SELECT (v_vector) ON {TABLE} TO {{a}} WITH GRANT OPTION",
)


@both_modes
def test_a_dump_of_the_schema_is_what_it_was(table: Database, mode: str) -> None:
    """With privileges that others have handed on, options, and the name and comment of a NOT NULL."""
    with roles(table) as (a, b):
        for sql in HANDED_ON:
            table.run(SQL(sql).format(a=a, b=b))
        before, v = dumped(table), checksum(table)

        cut_over(table, mode)
        if mode == "swap":
            of_v = {line for line in before if line.startswith(("GRANT SELECT(v),", "COMMENT ON CONSTRAINT"))}
            assert of_v <= dumped(table)
        undo(table)

        assert dumped(table) == before
        assert checksum(table) == v


HELD = f"""
SELECT attname, g.grantee::regrole::text, privilege_type, is_grantable FROM pg_attribute, aclexplode(attacl) g
WHERE attrelid = '{TABLE}'::regclass AND NOT attisdropped ORDER BY 1, 2, 3
"""


@both_modes
def test_an_owner_who_may_not_act_as_others_grants_what_they_had_handed_on(
    database: Database, owner: Database, mode: str
) -> None:
    with roles(database) as (a, b):
        database.run("CREATE EXTENSION vector")
        alembic(owner, "upgrade", "head")
        for sql in (HANDED_ON[4], HANDED_ON[5], HANDED_ON[7]):
            database.run(SQL(sql).format(a=a, b=b))
        held = database.rows(HELD)

        cut_over(owner, mode)
        if mode == "swap":  # by name, and those on the vectors beside
            named = [("v_bytea" if column == "v_vector" else column, *rest) for column, *rest in held]
            assert database.rows(HELD) == sorted(named)
        undo(owner)

        assert database.rows(HELD) == held
