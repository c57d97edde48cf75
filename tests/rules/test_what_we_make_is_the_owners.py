"""R8: what is made belongs to the owner of the table, and lives on without the role that made it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support import native
from tests.support.commands import alembic, om
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.preflight import check
from tests.support.scripts import SINGLE, offline, stopped
from tests.support.states import refused, stamp

DIM = 8
ENV = {"OM_VEC_DIM": str(DIM)}
ROW = random_rows(1, DIM, seed=5)[0]
# of tables, functions and types of rows
OF_OTHERS = """
SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'app'::regnamespace AND proowner <> %s::regrole
UNION ALL
SELECT 'table ' || relname FROM pg_class WHERE relnamespace = 'app'::regnamespace AND relowner <> %s::regrole
"""


@pytest.fixture
def roles(server: Server, database: Database) -> Iterator[tuple[Database, Database]]:
    """The database as the owner of the table sees it, and as a member of that role does, who is to migrate."""
    owner, member = f"owner of {database.name}", f"member of {database.name}"
    names = {"o": Identifier(owner), "m": Identifier(member), "d": Identifier(database.name)}
    database.run(
        SQL(
            "CREATE EXTENSION vector; CREATE ROLE {o} LOGIN; CREATE ROLE {m} LOGIN; GRANT {o} TO {m};"
            " CREATE SCHEMA app;"
            " GRANT USAGE, CREATE ON SCHEMA app TO {o}; ALTER DATABASE {d} SET search_path = app, public"
        ).format(**names)
    )
    create_table(database, schema="app")
    rows = random_rows(120, DIM)
    load(database, [rows[0]._replace(v=b"abc"), *rows[1:]], schema="app")
    database.run(SQL("ALTER TABLE app.{} OWNER TO {}").format(Identifier(TABLE), names["o"]))
    yield (
        Database(database.name, server.url(database.name, user=owner)),
        Database(database.name, server.url(database.name, user=member)),
    )
    database.run(SQL("ALTER TABLE IF EXISTS app.{} OWNER TO CURRENT_USER").format(Identifier(TABLE)))
    database.run(SQL("DROP OWNED BY {o}, {m} CASCADE; DROP ROLE {o}, {m}").format(**names))


def of_others(database: Database, owner: Database) -> list[str]:
    role = f'"{owner.value("SELECT current_user")}"'
    return [name for (name,) in database.rows(OF_OTHERS, role, role)]


def write(by: Database, column: str, value: object) -> None:
    by.run(
        SQL("INSERT INTO app.{} (id, sector, user_id, {}, dim) VALUES (gen_random_uuid(), 'x', 'u', %s, %s)").format(
            Identifier(TABLE), Identifier(column)
        ),
        value,
        DIM,
    )
    by.run(SQL("UPDATE app.{0} SET {1} = {1}").format(Identifier(TABLE), Identifier(column)))


@contextmanager
def gone(database: Database, member: Database) -> Iterator[None]:
    """The role that has migrated, whose objects would keep it from being dropped."""
    role = Identifier(member.value("SELECT current_user"))
    owner = Identifier(database.value(f"SELECT tableowner FROM pg_tables WHERE tablename = '{TABLE}'"))
    database.run(SQL("DROP ROLE {}").format(role))
    yield
    database.run(SQL("CREATE ROLE {0} LOGIN; GRANT {1} TO {0}").format(role, owner))


ENVIRON = {**ENV, "OM_PG_SCHEMA": "app"}


@pytest.mark.parametrize("by", ["member", pytest.param("superuser", marks=pytest.mark.slow)])
def test_a_life(database: Database, roles: tuple[Database, Database], by: str) -> None:
    owner, member = roles
    runs = database if by == "superuser" else member

    alembic(runs, "upgrade", "head", env=ENVIRON)
    assert of_others(database, owner) == []
    with gone(database, member):
        write(owner, "v", ROW.v)
        assert mismatches(database, schema="app") == []
        assert om(owner, "status", env=ENVIRON).returncode == 0
        assert stamp(owner, "app")

    for mode in ("swap", "drop"):
        env = ENVIRON | {"OM_CUTOVER": mode, "OM_ACCEPT_LOSS": "1"}
        alembic(runs, "-n", "cutover", "upgrade", "head", env=env)
        assert of_others(database, owner) == []
        with gone(database, member):
            write(owner, "v" if mode == "swap" else "v_vector", f"[{','.join('1' * DIM)}]")
        alembic(runs, "-n", "cutover", "downgrade", "base", env=env)
        assert of_others(database, owner) == []
        with gone(database, member):
            write(owner, "v", ROW.v)
        assert mismatches(database, schema="app") == []

    with gone(database, member):
        alembic(owner, "downgrade", "base", env=ENVIRON)
        write(owner, "v", ROW.v)


@pytest.mark.parametrize("single", [{}, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["", "one transaction"])
def test_a_script(server: Server, database: Database, roles: tuple[Database, Database], single: dict[str, str]) -> None:
    owner, member = roles
    offline(server, member, "upgrade", "head", env={**ENVIRON, **single})
    assert of_others(database, owner) == []
    with gone(database, member):
        write(owner, "v", ROW.v)
        assert mismatches(database, schema="app") == []
        offline(server, owner, "downgrade", "head:base", env={**ENVIRON, **single})
        write(owner, "v", ROW.v)


def test_a_table_of_vectors(database: Database, roles: tuple[Database, Database]) -> None:
    owner, member = roles
    database.run(SQL("DROP TABLE app.{}").format(Identifier(TABLE)))
    native.create_newer(database, random_rows(60, DIM), schema="app")
    database.run(
        SQL("ALTER TABLE app.{} OWNER TO {}").format(Identifier(TABLE), Identifier(owner.value("SELECT current_user")))
    )

    alembic(member, "upgrade", "head", env=ENVIRON)

    assert of_others(database, owner) == []
    with gone(database, member):
        write(owner, "v", f"[{','.join('1' * DIM)}]")


CASTS = {"array_to_vector(double precision[], integer, boolean)", "vector_to_float4(vector, integer, boolean)"}
REFUSED = {
    **{
        f"an owner that may not execute {cast.partition('(')[0]}": (
            f"REVOKE ALL ON FUNCTION public.{cast} FROM PUBLIC",
            ["which owns table", "may not execute public.", "GRANT EXECUTE ON FUNCTION public."],
        )
        for cast in sorted(CASTS)
    },
    "a member without inheritance": (
        "GRANT USAGE, CREATE ON SCHEMA app TO {m}; REVOKE {o} FROM {m}; GRANT {o} TO {m} WITH INHERIT FALSE",
        ["does not own table", "whose rights it does not inherit", " SET ROLE "],
    ),
    "a member that may not SET ROLE": (
        "REVOKE {o} FROM {m}; GRANT {o} TO {m} WITH INHERIT TRUE, SET FALSE",
        ["may not SET ROLE", "WITH SET TRUE;"],
    ),
    "an owner that may create nothing": (
        "GRANT CREATE ON SCHEMA app TO {m}; REVOKE CREATE ON SCHEMA app FROM {o}",
        ["may not create functions in schema", "GRANT CREATE ON SCHEMA"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_cannot_be_the_owners_it_is_refused_before_any_change(
    server: Server, database: Database, roles: tuple[Database, Database], case: str
) -> None:
    owner, member = roles
    made_so, said = REFUSED[case]
    names = {"o": Identifier(owner.value("SELECT current_user")), "m": Identifier(member.value("SELECT current_user"))}
    database.run(SQL(made_so).format(**names))

    log = refused(database, *said, env=ENVIRON, by=member)
    found = [one["message"] for one in check(member, 1, env=ENVIRON)["findings"] if one["code"] == "rights"]
    assert found[0] in log.log
    if "inheritance" not in case:  # or its script can't even lock the table
        stopped(server, member, ENVIRON, found[0])


def test_who_is_a_member_without_inheritance_does_what_the_hint_says(
    database: Database, roles: tuple[Database, Database]
) -> None:
    owner, member = roles
    names = {"o": Identifier(owner.value("SELECT current_user")), "m": Identifier(member.value("SELECT current_user"))}
    database.run(SQL(REFUSED["a member without inheritance"][0]).format(**names))
    database.run(SQL("ALTER ROLE {m} SET ROLE {o}").format(**names))

    alembic(member, "upgrade", "head", env=ENVIRON)
    assert of_others(database, owner) == []
    assert mismatches(database, schema="app") == []


def test_a_function_of_somebody_elses_is_named_before_anything_is_taken_down(
    server: Server, database: Database, roles: tuple[Database, Database]
) -> None:
    owner, _ = roles
    alembic(owner, "upgrade", "head", env=ENVIRON)
    database.run(f'ALTER FUNCTION app."{TABLE}_vvector_sync"() OWNER TO CURRENT_USER')
    before = stamp(owner, "app")
    for command in (("downgrade", "base"), ("downgrade", "-1")):
        done = alembic(owner, *command, env=ENVIRON, check=False)
        assert done.returncode != 0
        assert "HINT:  Connect as that role, or: ALTER FUNCTION" in done.log
    assert stamp(owner, "app") == before
    done = offline(server, owner, "downgrade", "om_20240107_pgvector:base", env=ENVIRON, check=False)
    assert "belongs to" in done.stderr

    assert om(database, "repair", env=ENVIRON).returncode == 0
    alembic(owner, "downgrade", "base", env=ENVIRON)


def test_another_owner_gets_the_version_table_by_a_repair(database: Database, roles: tuple[Database, Database]) -> None:
    owner, member = roles
    alembic(owner, "upgrade", "head", env=ENVIRON)
    new = Identifier(member.value("SELECT current_user"))
    old = Identifier(owner.value("SELECT current_user"))
    database.run(SQL("REVOKE {0} FROM {1}; GRANT USAGE, CREATE ON SCHEMA app TO {1}").format(old, new))
    database.run(SQL("ALTER TABLE app.{} OWNER TO {}").format(Identifier(TABLE), new))
    said = om(member, "status", env=ENVIRON)
    assert said.returncode == 1
    assert "openmemory-migrations repair" in said.log

    assert om(database, "repair", env=ENVIRON).returncode == 0

    assert of_others(database, member) == []
    assert om(member, "status", env=ENVIRON).returncode == 0
    alembic(member, "downgrade", "base", env=ENVIRON)
