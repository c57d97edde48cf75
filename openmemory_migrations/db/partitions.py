"""The tables that hold the rows: the target itself, or the leaves of its partition tree, at whatever depth."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from ..errors import MigrationError
from ..sql import SQL, blocks, quote
from .database import Database
from .sqlerrors import UNDEFINED_TABLE, functions_of, sqlstate

BLOCKS = blocks("db")


@dataclass(frozen=True)
class Part:
    """A table of the tree, the root (without `parent`) included; an ordinary table is its own only part."""

    oid: int
    parent: int | None
    schema: str
    name: str
    kind: str  # pg_class.relkind
    owner: str
    owned: bool  # by this role, or by one that it is a member of
    rows_hidden: bool  # row-level security applies to this role

    @property
    def is_leaf(self) -> bool:
        return self.kind != "p"

    @property
    def sql_name(self) -> SQL:
        return quote(self.schema, self.name)

    def gone(self, error: DBAPIError) -> bool:
        """Whether an error says that this partition is no longer where it was; the root is never passed over. What a
        function of others' doesn't find is another table."""
        return self.parent is not None and sqlstate(error) == UNDEFINED_TABLE and not functions_of(error)

    def __str__(self) -> str:
        return f'"{self.schema}.{self.name}"'

    def at(self, db: Database) -> Database:
        """The same connection, with this part where SQL texts say `{table}`."""
        return db.at({"table": self.sql_name})


def require_whole(db: Database, table_oid: int) -> None:
    """Raises MigrationError while a partition is being detached CONCURRENTLY, or was left so: no ALTER of the table
    reaches it any more, and what it gets afterwards is not what the table has."""
    for part, parent in db.rows(BLOCKS.being_detached, {"tables": [part.oid for part in parts(db, table_oid)]}):
        raise MigrationError(
            f"partition {part} is being detached from {parent}",
            detail="A change of the table's columns would not reach it.",
            hint="Wait until that has ended; or, if it was interrupted:"
            f" ALTER TABLE {parent} DETACH PARTITION {part} FINALIZE;",
        )


def parts(db: Database, table_oid: int) -> list[Part]:
    """The tree from the root down, without a partition that is just being detached."""
    rows = db.rows(
        BLOCKS.parts,
        {"oid": table_oid},
    )
    return [Part(*row) for row in rows]


def leaves(db: Database, table_oid: int) -> list[Part]:
    """Where the rows are."""
    return [part for part in parts(db, table_oid) if part.is_leaf]
