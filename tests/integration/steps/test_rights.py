"""Roles, row-level security, and where the extension lives."""

from __future__ import annotations

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, random_rows
from tests.support.roles import _name, other, owner
from tests.support.states import EXPAND, HEAD, INDEX, indexes, nearest, plan, refused, snapshot, stamp

__all__ = ["other", "owner"]  # fixtures

HIDE = f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON {TABLE} USING (user_id = 'user1');"
FORCE = f"ALTER TABLE {TABLE} FORCE ROW LEVEL SECURITY"


def test_a_role_that_may_not_create_the_extension_gets_the_line_for_an_administrator(
    database: Database, owner: Database
) -> None:
    refused(database, 'extension "vector"', 'CREATE EXTENSION vector SCHEMA "public";', by=owner)

    assert stamp(database) is None


def test_the_owner_needs_no_more_rights_once_the_extension_is_there(database: Database, owner: Database) -> None:
    database.run("CREATE EXTENSION vector")
    v, before = checksum(database), snapshot(database)

    alembic(owner, "upgrade", "head")

    assert mismatches(database, dim=8) == []
    assert checksum(database) == v
    assert list(indexes(database)) == [INDEX]
    alembic(owner, "downgrade", "base")
    assert snapshot(database) == before


def test_a_member_of_the_owner_is_as_good_as_the_owner(database: Database, owner: Database, other: Database) -> None:
    database.run("CREATE EXTENSION vector")
    database.run(SQL("GRANT {} TO {}").format(_name(owner), _name(other)))

    alembic(other, "upgrade", "head")

    assert mismatches(database, dim=8) == []
    assert stamp(database) == [HEAD]


def test_a_role_that_does_not_own_the_table_is_told_who_does(
    database: Database, owner: Database, other: Database
) -> None:
    database.run("CREATE EXTENSION vector")
    database.run(
        SQL("GRANT CREATE ON SCHEMA public TO {0}; GRANT ALL ON {1} TO {0}").format(_name(other), Identifier(TABLE))
    )

    said = ["does not own", f'"public.{TABLE}"', f'"owner of {database.name}"', "HINT:  "]
    refused(database, *said, by=other)

    assert stamp(database) is None


def test_a_role_that_may_not_create_in_the_schema_gets_the_line_that_lets_it(
    database: Database, owner: Database
) -> None:
    database.run("CREATE EXTENSION vector")
    database.run(SQL("REVOKE CREATE ON SCHEMA public FROM PUBLIC, {}").format(_name(owner)))

    refused(database, f'GRANT CREATE ON SCHEMA "public" TO "owner of {database.name}";', by=owner)


def test_row_security_that_binds_the_owner_is_an_error_and_never_a_part_of_the_rows(
    database: Database, owner: Database
) -> None:
    database.run("CREATE EXTENSION vector")
    database.run(HIDE + FORCE)

    refused(database, "row-level security", f'"public.{TABLE}"', "HINT:  ", by=owner)

    assert stamp(database) is None


def test_row_security_that_does_not_bind_the_owner_hides_nothing(database: Database, owner: Database) -> None:
    database.run("CREATE EXTENSION vector")
    database.run(HIDE)

    alembic(owner, "upgrade", "head")

    assert mismatches(database, dim=8) == []


@pytest.mark.parametrize("command", [("upgrade", "head"), ("downgrade", "base")])
def test_row_security_that_comes_later_stops_the_next_step(
    database: Database, owner: Database, command: tuple[str, str]
) -> None:
    database.run("CREATE EXTENSION vector")
    alembic(owner, "upgrade", EXPAND)
    database.run(HIDE + FORCE)

    refused(database, "row-level security", command=command, by=owner)

    assert stamp(database) == [EXPAND]


def test_a_new_extension_goes_to_the_schema_extensions_if_there_is_one(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    database.run("CREATE SCHEMA extensions")

    alembic(database, "upgrade", "head")

    assert snapshot(database)["extensions"][-1][::2] == ("vector", "extensions")
    assert mismatches(database, dim=8) == []


def test_a_new_extension_never_goes_to_the_schema_of_the_table(database: Database) -> None:
    create_table(database, schema="app")
    load(database, random_rows(60, 8), schema="app")
    database.run(SQL("ALTER DATABASE {} SET search_path = app").format(Identifier(database.name)))

    alembic(database, "upgrade", "head", env={"OM_PG_SCHEMA": "app"})

    assert snapshot(database)["extensions"][-1][::2] == ("vector", "public")
    assert mismatches(database, schema="app", dim=8) == []


@pytest.mark.parametrize(("home", "search_path"), [("extensions", "public"), ('Ext "1"', "")])
def test_an_extension_out_of_sight_serves_writers_who_may_not_look_into_its_schema(
    database: Database, other: Database, home: str, search_path: str
) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    database.run(SQL("CREATE SCHEMA {0}; CREATE EXTENSION vector SCHEMA {0}").format(Identifier(home)))
    database.run(SQL("ALTER DATABASE {} SET search_path = %s").format(Identifier(database.name)), search_path)
    database.run(SQL("GRANT SELECT, INSERT, UPDATE ON public.{} TO {}").format(Identifier(TABLE), _name(other)))
    before = snapshot(database)

    alembic(database, "upgrade", "head")
    written = random_rows(4, 8, seed=1)
    load(other, written, schema="public")
    for row, new in zip(written[:2], [random_rows(1, 8, seed=2)[0].v, b"no vector"], strict=True):
        other.run(f"UPDATE public.{TABLE} SET v = %s WHERE id = %s", new, row.id)

    assert not other.value("SELECT has_schema_privilege(%s, 'USAGE')", home)
    assert database.value(f"SELECT count(v_vector) FROM public.{TABLE}") == 63
    assert mismatches(database, dim=8) == []
    quoted = home.replace('"', '""')
    assert f"Index Scan using {INDEX}" in plan(database, nearest(8, f'OPERATOR("{quoted}".<->)'))
    database.run(f"DELETE FROM public.{TABLE} WHERE id = ANY (%s::uuid[])", [row.id for row in written])
    alembic(database, "downgrade", "base")
    assert snapshot(database) == before
