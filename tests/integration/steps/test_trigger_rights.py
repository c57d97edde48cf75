"""The sync trigger works for whoever may write the table, under whatever settings, and gives nobody more rights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

import psycopg2
import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic
from tests.support.openmemory import Database, create_table, expected, load, mismatches, random_rows
from tests.support.sync_trigger import DIM, FIRST, KEY, ODD, REPAIR, SECOND, WITH_NAN, stored, table
from tests.support.writers import UPSERT

__all__ = ["table"]  # a fixture

ARGUMENTS = {
    "octet_length": "bytea",
    "get_byte": "bytea, integer",
    "generate_series": "integer, integer, integer",
    "array_position": "double precision[], double precision",
    "vector_send": "public.vector",
    "record_image_eq": "record, record",
    "openmemory_vectors_vvector_sync": "",
}
OPERATORS = {
    "integer, integer": ["=", "<>", "<", ">", ">=", "<=", "+", "-", "*", "/", "&", "<<", ">>"],
    "double precision, double precision": ["*", "-", "^"],
    "integer, double precision": ["*"],
    "bytea, bytea": ["||", "=", "<>"],
    "text, text": ["=", "<>"],
    "public.vector, public.vector": ["=", "<>"],
}


def hostile() -> Iterator[str]:
    """A schema with all that the trigger uses, under the same names, and each of them fails."""
    yield "CREATE SCHEMA hostile; SET search_path = hostile, pg_catalog, public"
    body = "LANGUAGE plpgsql AS $$ BEGIN RAISE 'hostile'; END $$"
    for name, arguments in ARGUMENTS.items():
        yield f"CREATE FUNCTION hostile.{name}({arguments}) RETURNS integer {body}"
    for number, (arguments, operators) in enumerate(OPERATORS.items()):
        yield f"CREATE FUNCTION hostile.operator_{number}({arguments}) RETURNS integer {body}"
        left, right = arguments.split(", ")
        for operator in operators:
            yield (
                f"CREATE OPERATOR hostile.{operator} (LEFTARG = {left}, RIGHTARG = {right},"
                f" FUNCTION = hostile.operator_{number})"
            )
    for name in ("vector", "float8"):
        yield f"CREATE DOMAIN hostile.{name} AS text CHECK (false)"
        yield f"CREATE DOMAIN pg_temp.{name} AS text CHECK (false)"


@pytest.mark.parametrize("path", ["", "hostile", "hostile, pg_catalog, public", "pg_temp, hostile, pg_catalog"])
def test_a_hostile_search_path_changes_nothing(table: Database, path: str) -> None:
    with closing(table.connect()) as connection, connection.cursor() as cursor:
        for statement in hostile():
            cursor.execute(statement)
        for asked in ("octet_length('x'::bytea)", "1 + 1"):
            with pytest.raises(psycopg2.errors.RaiseException, match="hostile"):
                cursor.execute(f"SELECT {asked}")
        cursor.execute(f"SET search_path = {path or repr('')}")
        for v in (FIRST, ODD, WITH_NAN, SECOND):
            cursor.execute(UPSERT.replace(TABLE, f"public.{TABLE}"), (*KEY, "user", v, DIM))
            assert stored(table) == (v, expected(v, DIM))
        cursor.execute(f"UPDATE public.{TABLE} SET v = v")
        assert stored(table) == (SECOND, expected(SECOND))


def test_no_setting_of_the_writers_session_changes_anything(table: Database) -> None:
    settings = {
        "standard_conforming_strings": "off",
        "escape_string_warning": "off",
        "bytea_output": "escape",
        "extra_float_digits": "-15",
        "array_nulls": "off",
        "transform_null_equals": "on",
        "quote_all_identifiers": "on",
        "client_encoding": "LATIN1",
        "plan_cache_mode": "force_generic_plan",
        "enable_seqscan": "off",
        "enable_material": "off",
        "jit_above_cost": "0",
        "row_security": "off",
        "default_transaction_isolation": "serializable",
        "plpgsql.variable_conflict": "use_variable",
        "plpgsql.extra_errors": "all",
    }
    with closing(table.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("LOAD 'plpgsql'")
        for name, value in settings.items():
            cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
        for v in (FIRST, ODD, WITH_NAN, SECOND):
            cursor.execute(UPSERT, (*KEY, "user", v, DIM))
            assert stored(table) == (v, expected(v, DIM))
        cursor.execute("SET plpgsql.variable_conflict = use_column")
        cursor.execute(REPAIR)
    assert stored(table) == (SECOND, expected(SECOND))


def test_a_role_with_no_right_but_to_write_the_table(server: embedded.Server, database: Database) -> None:
    """The owner is no superuser either; the extension is where only the owner may look."""
    owner, writer = f"owner of {database.name}", f"writer of {database.name}"
    schema, table = "Om-Test", "vectors"
    create_table(database, table, schema)
    load(database, random_rows(5, DIM), table, schema)
    name = {"t": Identifier(schema, table), "s": Identifier(schema), "o": Identifier(owner), "w": Identifier(writer)}

    def grant(statement: str) -> None:
        database.run(SQL(statement).format(**name))

    grant("CREATE ROLE {o} LOGIN; CREATE ROLE {w} LOGIN")
    grant("ALTER SCHEMA {s} OWNER TO {o}; ALTER TABLE {t} OWNER TO {o}")
    grant("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    grant("REVOKE ALL ON TYPE extensions.vector FROM PUBLIC; GRANT USAGE ON TYPE extensions.vector TO {o}")
    grant("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA extensions FROM PUBLIC")
    grant("GRANT USAGE ON SCHEMA extensions TO {o}; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA extensions TO {o}")
    settings = {"OM_PG_SCHEMA": schema, "OM_VECTOR_TABLE": table}
    alembic(Database(database.name, server.url(database.name, owner)), "upgrade", "head", env=settings)
    grant("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {s} FROM PUBLIC")
    grant("GRANT USAGE ON SCHEMA {s} TO {w}; GRANT SELECT, INSERT, UPDATE, DELETE ON {t} TO {w}")

    with closing(psycopg2.connect(server.url(database.name, writer))) as connection, connection.cursor() as cursor:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("SELECT '[1]'::extensions.vector")
        connection.rollback()
        for row in random_rows(20, DIM, seed=1):
            write = SQL(UPSERT.replace(TABLE, "{}", 1)).format(name["t"])
            for v in (FIRST, WITH_NAN, b"", row.v):
                cursor.execute(write, (row.id, row.sector, row.user_id, v, DIM))
        cursor.execute(SQL("UPDATE {t} SET v = v").format(**name))
        cursor.execute(SQL("DELETE FROM {t} WHERE sector = 'semantic'").format(**name))
        connection.commit()

    assert database.value(SQL("SELECT count(v_vector) FROM {t}").format(**name)) == 25 * 4 // 5
    assert mismatches(database, table, schema) == []


def test_the_function_is_bound_and_nobodys_to_call(table: Database) -> None:
    (found,) = table.rows(
        """
        SELECT prosecdef, proconfig, prosrc, has_function_privilege('public', p.oid, 'EXECUTE'), lanname
        FROM pg_trigger JOIN pg_proc p ON p.oid = tgfoid JOIN pg_language l ON l.oid = prolang
        WHERE tgrelid = %s::regclass AND NOT tgisinternal
        """,
        TABLE,
    )
    definer, settings, source, public, language = found

    assert definer
    assert settings == ["search_path=pg_catalog, pg_temp"]
    assert not public
    assert language == "plpgsql"
    # a block with EXCEPTION is a subtransaction for every row
    assert not re.search(r"\bexception\b", source, re.IGNORECASE)
