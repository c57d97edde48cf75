"""Functions for the time of a run: in pg_temp, where nobody else can call them, and gone with the session.

A function of others' that is SECURITY DEFINER finds them in the session that calls it, hence REVOKE where it matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from ..db.catalog import Extension
from ..db.database import Database
from ..errors import MigrationError
from ..sql import FUNCTION


@dataclass(frozen=True)
class Temporary:
    """Statements, with the names of a `Database` and the extension's."""

    create: tuple[str, ...]
    drop: str

    def make(self, db: Database, extension: Extension) -> None:
        """Inside a transaction, so that nobody else may call it at any moment."""
        for statement in self.create:
            db.run(statement, tag=FUNCTION, **extension.names())

    @contextmanager
    def there(self, db: Database, extension: Extension) -> Iterator[None]:
        """For the session, while this lasts; behind a pooler each batch has to bring its own (`here`)."""
        if db.pooled:
            yield
            return
        with db.transaction():
            self.make(db, extension)
        try:
            yield
        finally:
            if db.usable:
                with suppress(DBAPIError, MigrationError):  # a session that ends drops it as well
                    db.rollback()
                    with db.transaction():
                        db.run(self.drop)

    @contextmanager
    def here(self, db: Database, extension: Extension) -> Iterator[None]:
        """Inside the transaction of a batch, where the next may be on another session."""
        if db.pooled:
            self.make(db, extension)
        yield
        if db.pooled:
            db.run(self.drop)
