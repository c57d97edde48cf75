"""One step on one table: its locks, what has to be there, the backfill with its verdict. Knows nothing of Alembic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from .. import log
from ..backfill.leftovers import Leftovers
from ..columns.marks import UNDO_HINT, Mark
from ..db import catalog, locks
from ..db.catalog import Extension, Table
from ..db.database import Database
from ..errors import MigrationError
from ..settings import Settings
from ..target import Target, quote
from . import backfill, checks, interference, native_table


@dataclass(frozen=True)
class Step:
    db: Database
    target: Target
    settings: Settings

    def alone(self) -> AbstractContextManager[None]:
        return self._held(locks.exclusive)

    def beside_others(self) -> AbstractContextManager[None]:
        return self._held(locks.shared)

    @contextmanager
    def _held(self, lock: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
        key = ("table", self.target.schema, self.target.table)
        with lock(self.db.connection.engine, str(self.target), *key, sleep=self.db.stop.sleep):
            self.db.renew()
            yield

    @property
    def newer(self) -> bool:
        """Whether `v` holds vectors itself: then what there is to do is another thing (native_table.py)."""
        return native_table.applies(self.db, self.target)

    @property
    def native(self) -> Step:
        """The same for such a table, with `v` in the place of both columns."""
        target = self.target.native
        return Step(self.db.at(target.names()), target, self.settings.native)

    def prepared(self, stamp: Iterable[str] | None) -> tuple[Table, Extension] | None:
        """The table with its column of ours, everything before it committed; None where `v` is a vector already.

        `stamp` are the revisions that say that there is such a column, None where nothing says it.
        """
        with self.db.reading():
            table = checks.require_table(self.db, self.target)
            if checks.already_vector(table, self.target):
                return None
            checks.require_column(table, self.target, self.settings, stamp)
            extension = catalog.extension(self.db)
        self.db.take_over()
        assert extension is not None  # there is a column of its type
        return table, extension

    @property
    def cut_over(self) -> Mark | None:
        with self.db.reading():
            table = catalog.table(self.db, self.target.schema, self.target.table)
        return Mark.of(table, self.target) if table else None

    def searched(self) -> tuple[Step, Table, Extension]:
        """The step on the column that searches go by, whatever the table is, and what is there."""
        found = self.cut_over
        if self.newer or (found and found.mode == "swap"):
            return self.native, *native_table.prepared(self.db, self.target)
        if found:
            return self, *native_table.prepared(self.db, self.target)
        ready = self.prepared(None)
        assert ready is not None  # it is None for those above only
        return self, *ready

    def refuse_cut_over(self) -> None:
        """Raises MigrationError for a step back from a table that was cut over: its bytes have to be there first."""
        if found := self.cut_over:
            raise MigrationError(found.said(self.target), hint=UNDO_HINT)

    def backfill(self, table: Table, extension: Extension, *, last: bool) -> Leftovers:
        """Converts what is pending and reports what can't be. Raises MigrationError for that if OM_ON_BAD_ROWS is fail.

        The `last` of any number of runs also puts values without source into our column and drops the adopted one.
        """
        db, target, settings = self.db, self.target, self.settings
        with db.transaction():
            interference.warn(interference.of_sync(db, target, table))
            for _, problem in interference.of_the_table(db, target, table, settings.lock_timeout_ms):
                raise problem
        left = backfill.run(db, target, settings, table, extension)
        aside = table.columns.get(target.adopted)
        if aside is not None and aside.set_aside:
            if last:
                backfill.carry_over(db, target, settings, table, extension)
            else:
                log.notice(f"{quote(target.adopted)} of {target} is kept until the revision has run")
        if left.dim_differs:
            log.notice(
                f"column dim disagrees with the bytes in {left.dim_differs:,} rows of {target}; the bytes decided"
            )
        if left.in_the_way:
            self._refused(left.kept, left.in_the_way)
        if left.convertible:
            log.warning(
                f"{left.convertible:,} rows of {target} were written during the backfill and have no vector",
                detail="OM_SYNC_TRIGGER is off, so nothing converts what the application writes.",
            )
        if left.skipped:
            message = f"{left.skipped:,} rows of {target} can't be converted and were skipped"
            hint = (
                f"Mend {quote(target.source)} in those rows; the trigger, or UPDATE … SET {quote(target.source)} ="
                f" {quote(target.source)}, then fills {quote(target.vector)}."
            )
            if settings.on_bad_rows == "fail":
                raise MigrationError(message, detail=f"{left.summary()}. All others are converted.", hint=hint)
            log.warning(message, detail=f"{left.summary()}.", hint=hint)
        return left

    def _refused(self, rows: int, detail: str) -> None:
        """For rows whose bytes are a vector: that they are passed by has to be said, a default doesn't say it."""
        message = f"{rows:,} rows of {self.target} could not be converted, though their bytes are vectors"
        if self.settings.on_bad_rows == "skip" and "on_bad_rows" in self.settings.given:
            log.warning(message, detail=detail)
            return
        raise MigrationError(
            message,
            detail=f"{detail} All others are converted.",
            hint="Mend those rows, or what refuses them, then run the same command again; or set OM_ON_BAD_ROWS=skip.",
        )
