"""How a table says that it was cut over: in the comment of its column of vectors, with what the way back needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..db.catalog import Table
from ..errors import MigrationError
from ..marks import CUT_OVER
from ..sql import SQL, quote
from ..target import Target
from . import properties
from .properties import Attributes, Grant

DO, UNDO = "alembic -n cutover upgrade head", "alembic -n cutover downgrade base"
NO_SCRIPT = "the cutover has no script (--sql), it runs online only"
UNDO_HINT = (
    f"First undo the cutover: {UNDO}, or openmemory-migrations cutover downgrade (in a chain of the host's, what comes"
    " after the revision that calls ops.upgrade_cutover, and that one)."
)

Mode = Literal["swap", "drop"]


@dataclass(frozen=True)
class Mark:
    """`source` and `vector` are what the columns had beside their values; `renamed` the index that newer OpenMemory
    finds under its own name, which had this one before. `parts` are the privileges on `source` that partitions had of
    their own, by their names, where the column is no more. `dimensions` are those that the vectors had; None in a mark
    of before they were noted. `kept` rows were in the kept table at the switch."""

    mode: Mode
    source: Attributes
    vector: Attributes
    renamed: str | None = None
    parts: Mapping[str, tuple[Grant, ...]] = field(default_factory=dict)
    dimensions: int | None = None
    kept: int = 0

    @property
    def text(self) -> str:
        data = {
            "mode": self.mode,
            "source": self.source.as_data(),
            "vector": self.vector.as_data(),
            "renamed": self.renamed,
            "dimensions": self.dimensions,
            "kept": self.kept,
            "parts": {name: properties.grants_as_data(grants) for name, grants in self.parts.items()},
        }
        return CUT_OVER + json.dumps(data, sort_keys=True)

    @classmethod
    def of(cls, table: Table, target: Target) -> Mark | None:
        """The table's, None where it is not cut over."""
        for name in (target.source, target.vector):
            column = table.columns.get(name)
            if column is not None and column.cut_over:
                try:
                    return cls._of_text(column.comment)
                except (ValueError, LookupError, TypeError) as error:
                    raise changed(target, name) from error
        return None

    @classmethod
    def _of_text(cls, text: str) -> Mark:
        data = json.loads(text.removeprefix(CUT_OVER))
        numbers = (data.get("dimensions") or 0, data.get("kept", 0))
        if (
            data["mode"] not in ("swap", "drop")
            or not isinstance(data["parts"], dict)
            or not isinstance(data["renamed"], (str, type(None)))
            or not all(isinstance(number, int) for number in numbers)
        ):
            raise ValueError(data)
        attributes = {name: Attributes.of_data(data[name]) for name in ("source", "vector")}
        parts = {name: properties.grants_of_data(grants) for name, grants in data["parts"].items()}
        return cls(
            data["mode"],
            **attributes,
            renamed=data["renamed"],
            parts=parts,
            dimensions=data.get("dimensions"),
            kept=data.get("kept", 0),
        )

    def now(self, target: Target) -> Target:
        """Where bytes, if there are any, and vectors are as long as this holds."""
        return target.swapped if self.mode == "swap" else target.dropped

    def require(self, mode: str, target: Target) -> None:
        """Raises MigrationError where the other mode is asked for."""
        if self.mode != mode:
            raise MigrationError(self.said(target), hint=f"For {mode} first undo that: {UNDO}.")

    def require_dimensions(self, table: Table, target: Target) -> None:
        """Raises MigrationError where the vectors haven't the dimensions any more with which they were cut over."""
        vector = self.now(target).vector
        column, wanted = table.columns[vector], self.dimensions
        there = column.dimensions
        if there is None or there != (wanted or there):
            has = f"{there:,} dimensions" if there else "no dimensions"
            raise MigrationError(
                f"column {quote(vector)} of {target} has {has}" + (f", and had {wanted:,}" if wanted else ""),
                detail="It was changed after the cutover.",
                hint=f"ALTER TABLE {quote(target.schema)}.{quote(target.table)} ALTER COLUMN {quote(vector)} TYPE"
                f" {column.type}({wanted or '…'}); which reads all rows under its lock.",
            )

    def require_names(self, table: Table, target: Target) -> None:
        """Raises MigrationError where a name is taken that undoing the cutover needs."""
        name = target.vector if self.mode == "swap" else target.source
        if name in table.columns:
            raise MigrationError(
                f"{target} has got a column {quote(name)} since the cutover",
                hint="Rename or drop it: undoing the cutover needs that name.",
            )
        archive = table.columns.get(target.archive)
        if archive is not None and archive.type != "bytea":
            raise MigrationError(
                f"column {quote(target.archive)} of {target} is of type {archive.type}", hint="Rename or drop it."
            )

    def said(self, target: Target) -> str:
        return said(target, self.mode)


def changed(target: Target, column: str) -> MigrationError:
    """Without what the comment says there is no way back."""
    return MigrationError(
        f"the comment on column {quote(column)} of {target} isn't what the cutover has put there",
        detail="It says how the table was cut over, and what the way back has to know.",
        hint="Put it back as it was: a dump of the table's schema has it, unless it was made with --no-comments.",
    )


def said(target: Target, mode: Mode) -> str:
    if mode == "swap":
        return f"{target} was cut over: {quote(target.source)} is the vector, the bytes are {quote(target.archive)}"
    return f"{target} was cut over: {quote(target.source)} was dropped, {quote(target.vector)} is what there is"


def names(target: Target) -> dict[str, SQL]:
    """For SQL texts that work on the columns of another `target`, whose other objects have the names that they had."""
    return {"source": quote(target.source), "vector": quote(target.vector)}
