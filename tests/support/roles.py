"""Roles that own the table, or don't."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.openmemory import Database, create_table, load, random_rows


def _role(server: Server, database: Database, kind: str) -> Iterator[Database]:
    # roles belong to the whole server
    name = f"{kind} of {database.name}"
    database.run(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
    yield Database(database.name, server.url(database.name, user=name))
    database.run(SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(Identifier(name)))


@pytest.fixture
def owner(server: Server, database: Database) -> Iterator[Database]:
    """The database as a plain role sees it that owns the table and may create in the schema `public`."""
    for owner in _role(server, database, "owner"):
        create_table(database)
        load(database, random_rows(60, 8))
        database.run(SQL("ALTER TABLE {} OWNER TO {}").format(Identifier(TABLE), _name(owner)))
        database.run(SQL("GRANT CREATE ON SCHEMA public TO {}").format(_name(owner)))
        yield owner


@pytest.fixture
def other(server: Server, database: Database) -> Iterator[Database]:
    """The database as a plain role sees it that owns nothing."""
    yield from _role(server, database, "other")


def _name(role: Database) -> Identifier:
    return Identifier(role.value("SELECT current_user"))
