"""What a step works on, as one value: the connection, what is meant and wanted, and what was found there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from ..settings import Settings
from ..target import Target
from .catalog import Extension, Table
from .database import Database

C = TypeVar("C", bound="Context")


@dataclass(frozen=True)
class Context:
    """Before anything was looked at."""

    db: Database
    target: Target
    settings: Settings

    def by(self: C, db: Database) -> C:
        """The same on another connection, or with other names in SQL."""
        return replace(self, db=db)

    def of(self: C, target: Target) -> C:
        """The same for other names of ours; those in SQL stay."""
        return replace(self, target=target)

    @property
    def native(self: C) -> C:
        """For a table whose `v` holds vectors: that in the place of both columns."""
        target = self.target.native
        return replace(self, db=self.db.at(target.names()), target=target, settings=self.settings.native)

    def with_table(self, table: Table) -> TableContext:
        return TableContext(self.db, self.target, self.settings, table)


@dataclass(frozen=True)
class TableContext(Context):
    """With the table as the catalogs had it."""

    table: Table

    def with_extension(self, extension: Extension) -> VectorContext:
        return VectorContext(self.db, self.target, self.settings, self.table, extension)


@dataclass(frozen=True)
class VectorContext(TableContext):
    """With the extension too, which is there wherever a column of vectors is."""

    extension: Extension
