"""For env.py: a migration gives the connection back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection


@contextmanager
def unchanged(connection: Connection) -> Iterator[None]:
    before = state(connection)
    yield
    after = state(connection)
    changed = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
    assert not changed, f"changed by the migration: {changed}"


def state(connection: Connection) -> dict[str, Any]:
    """The server's settings, isolation level and search_path among them, the role, and the driver's autocommit."""
    raw: Any = connection.connection.dbapi_connection
    settings = connection.execute(sa.text("SELECT name, setting FROM pg_catalog.pg_settings")).all()
    who = connection.execute(sa.text("SELECT current_user")).scalar()
    return {row.name: row.setting for row in settings} | {"user": who, "autocommit": bool(raw.autocommit)}
