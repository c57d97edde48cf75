"""What a migration could change in a database, asked of its catalogs: to compare before with after."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import psycopg2
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from tests.support.commands import NOTHING, Result, alembic
from tests.support.openmemory import Database, expected, random_rows

EXPAND, BACKFILL, HEAD = "om_20240107_pgvector", "om_20240107_backfill", "om_20240108_finalize"
INDEX, SECOND_INDEX = f"{TABLE}_vvector_idx", f"{TABLE}_vvector_ivfflat_idx"
IVFFLAT = f"CREATE INDEX {INDEX} ON public.{TABLE} USING ivfflat (v_vector) WITH (lists='1')"
# what a build leaves that was interrupted; only a superuser may say so
INVALIDATE = f"""
UPDATE pg_index SET indisvalid = false WHERE indexrelid IN (to_regclass('{INDEX}'), to_regclass('{SECOND_INDEX}'))
"""

State = dict[str, list[tuple[Any, ...]]]

# everything but the server's own, what extensions brought, and the version table, which has a question of its own
_OWN = """
WITH own AS (
    SELECT c.oid, n.nspname, c.relname, c.relkind, c.relowner, c.relacl, c.reloptions,
           c.relrowsecurity, c.relforcerowsecurity
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname !~ '^(pg_|information_schema$)' AND c.relname !~ '^openmemory_alembic_version'
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                      AND d.deptype = 'e'))
"""
_QUESTIONS = {
    "relations": """
        SELECT nspname, relname, relkind::text, pg_get_userbyid(relowner), relacl::text, reloptions::text,
               relrowsecurity, relforcerowsecurity
        FROM own
        """,
    "columns": """
        SELECT nspname, relname, row_number() OVER (PARTITION BY own.oid ORDER BY attnum), attname,
               format_type(atttypid, atttypmod), attnotnull, attstorage::text, attacl::text,
               pg_get_expr(adbin, adrelid), col_description(own.oid, attnum)
        FROM own JOIN pg_attribute a ON attrelid = own.oid LEFT JOIN pg_attrdef ON adrelid = own.oid AND adnum = attnum
        WHERE attnum > 0 AND NOT attisdropped AND relkind <> 'i'
        """,
    "constraints": """
        SELECT nspname, relname, conname, pg_get_constraintdef(c.oid)
        FROM own JOIN pg_constraint c ON conrelid = own.oid
        """,
    "indexes": """
        SELECT nspname, relname, pg_get_indexdef(indexrelid), indisvalid, indisready
        FROM own JOIN pg_index ON indexrelid = own.oid
        """,
    "triggers": """
        SELECT nspname, relname, pg_get_triggerdef(t.oid), tgenabled::text, obj_description(t.oid, 'pg_trigger')
        FROM own JOIN pg_trigger t ON tgrelid = own.oid WHERE NOT tgisinternal
        """,
    "functions": """
        SELECT n.nspname, pg_get_functiondef(p.oid), pg_get_userbyid(proowner), proacl::text
        FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
        WHERE n.nspname !~ '^(pg_|information_schema$)'
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                          AND d.deptype = 'e')
        """,
    "schemas": "SELECT nspname, nspacl::text FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema$)'",
    "extensions": "SELECT extname, extversion, nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace",
}


def snapshot(database: Database) -> State:
    """Return tables, columns, indexes, triggers, functions, extensions and all rows; not the version table."""
    state: State = {}
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        for what, sql in _QUESTIONS.items():
            cursor.execute(_OWN + sql)
            state[what] = sorted(cursor.fetchall(), key=repr)
        state["rows"] = []
        for schema, table, kind, *_ in state["relations"]:
            if kind in "rp":
                rows = SQL("SELECT count(*), md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {} t")
                cursor.execute(rows.format(Identifier(schema, table)))
                state["rows"].append((schema, table, *cursor.fetchall()[0]))
    return state


def without_extension(state: State) -> State:
    """Return the state without the extension `vector`, the one thing that a downgrade leaves."""
    return state | {"extensions": [row for row in state["extensions"] if row[0] != "vector"]}


def stamp(database: Database, schema: str = "public") -> list[str] | None:
    """Return what the version table says, None if there is no version table."""
    name = Identifier(schema, "openmemory_alembic_version")
    with closing(database.connect()) as connection:
        if database.value("SELECT to_regclass(%s)", name.as_string(connection)) is None:
            return None
    return [row[0] for row in database.rows(SQL("SELECT version_num FROM {}").format(name))]


def refused(
    database: Database,
    *said: str,
    command: tuple[str, ...] = ("upgrade", "head"),
    env: Mapping[str, str] = NOTHING,
    by: Database | None = None,
) -> Result:
    """Run alembic, `by` another role if given, and see it fail with all that is `said` and without any change."""
    before, stamped = snapshot(database), stamp(database)

    result = alembic(by or database, *command, env=env, check=False)

    assert result.returncode != 0, result.log
    assert "Traceback" not in result.log, result.log
    for text in ("FAILED: ", *said):
        assert text in result.log, f"{text!r} is not in the log:\n{result.log}"
    after = snapshot(database)
    changed = {what: (before[what], after[what]) for what in before if before[what] != after[what]}
    assert not changed, f"{changed}\n{result.log}"
    assert stamp(database) == stamped, f"the stamp was {stamped}, is {stamp(database)}\n{result.log}"
    return result


def column_type(database: Database, column: str = "v_vector", table: str = TABLE, schema: str = "public") -> str | None:
    """Return the type as `\\d` shows it, None if there is no such column."""
    rows = database.rows(
        """
        SELECT format_type(atttypid, atttypmod)
        FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace
        WHERE nspname = %s AND relname = %s AND attname = %s
        """,
        schema,
        table,
        column,
    )
    return rows[0][0] if rows else None


def indexes(database: Database, table: str = TABLE, schema: str = "public") -> dict[str, tuple[str, bool]]:
    """Return definition and validity of every ivfflat and hnsw index on the table."""
    rows = database.rows(
        """
        SELECT c.relname, pg_get_indexdef(c.oid), indisvalid AND indisready
        FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_am am ON am.oid = c.relam
             JOIN pg_class t ON t.oid = indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE n.nspname = %s AND t.relname = %s AND amname IN ('ivfflat', 'hnsw')
        """,
        schema,
        table,
    )
    return {name: (definition, valid) for name, definition, valid in rows}


def plan(database: Database, order_by: str, table: str = TABLE, schema: str = "public") -> str:
    """Return the plan of the five nearest rows, with the reading of a small table as a whole ruled out."""
    query = SQL("EXPLAIN (COSTS OFF) SELECT sector FROM {} {} LIMIT 5").format(Identifier(schema, table), SQL(order_by))
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(query)
        return "\n".join(line for (line,) in cursor)


def nearest(dim: int, operator: str = "<->") -> str:
    return f"ORDER BY v_vector {operator} '[{','.join(['1'] * dim)}]'"


def follows(database: Database, dim: int, table: str = TABLE, schema: str = "public") -> bool:
    """Tell whether v_vector is `v` to the bit after the application's insert and after its update; leaves no row."""
    written, updated = (row.v for row in random_rows(2, dim, seed=99))
    has_dim = column_type(database, "dim", table, schema) is not None
    home = "SELECT nspname FROM pg_namespace n, pg_extension e WHERE extnamespace = n.oid AND extname = 'vector'"
    names = {
        "table": Identifier(schema, table.replace("%", "%%")),  # psycopg2 takes one % of two away
        "columns": SQL("id, sector, v, dim" if has_dim else "id, sector, v"),
        "values": SQL(f"gen_random_uuid(), 'new', %s{f', {dim}' if has_dim else ''}"),
        "ext": Identifier(database.value(home)),
    }
    with closing(psycopg2.connect(database.url)) as connection, connection.cursor() as cursor:
        seen = []
        for sql, v in [
            ("INSERT INTO {table} ({columns}) VALUES ({values}) RETURNING {ext}.vector_send(v_vector)", written),
            ("UPDATE {table} SET v = %s WHERE sector = 'new' RETURNING {ext}.vector_send(v_vector)", updated),
        ]:
            cursor.execute(SQL(sql).format(**names), (v,))
            ((sent,),) = cursor.fetchall()
            seen.append(sent and bytes(sent))
        connection.rollback()
    return seen == [expected(written), expected(updated)]


def guards(database: Database) -> list[str]:
    """Triggers and functions that refuse writes for the time of a step, and are there still."""
    triggers = database.rows(
        "SELECT tgname FROM pg_trigger WHERE tgparentid = 0 AND obj_description(oid, 'pg_trigger') LIKE %s",
        "openmemory_migrations: refuses%",
    )
    functions = database.rows("SELECT proname FROM pg_proc WHERE proname LIKE %s", "%_guard")
    return [name for (name,) in triggers + functions]


def without_guards(state: State) -> State:
    """What a run that was stopped leaves where somebody reads the table, and does no harm."""
    return {what: [row for row in rows if f"{TABLE}_vvector_guard" not in repr(row)] for what, rows in state.items()}
