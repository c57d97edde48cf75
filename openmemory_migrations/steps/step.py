"""One step on one table: its locks, and what has to be there. Knows nothing of Alembic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from ..columns import cutover_mark
from ..columns.cutover_mark import UNDO_HINT, Mark
from ..db import catalog, locks
from ..db.context import Context, VectorContext
from ..db.database import WHATEVER, Database
from ..errors import MigrationError
from ..settings import Settings
from ..target import Target
from . import native_table, requirements


@dataclass(frozen=True)
class Step(Context):
    @classmethod
    def on(cls, db: Database, target: Target, settings: Settings) -> Step:
        """With the triggers of ours that the table has by now, in the transaction that is open."""
        with db.local(WHATEVER):
            target = catalog.located(db, target)
        return cls(db.at(target.names()), target, settings)

    def alone(self) -> AbstractContextManager[None]:
        return self._held(locks.exclusive)

    def beside_others(self) -> AbstractContextManager[None]:
        return self._held(locks.shared)

    @contextmanager
    def _held(self, lock: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
        with self.db.local(WHATEVER):
            requirements.require(self, requirements.BLOCKS.server)
        key = ("table", self.target.schema, self.target.table)
        with lock(self.db.connection.engine, str(self.target), *key, sleep=self.db.stop.sleep):
            self.db.renew()
            yield

    @property
    def is_native(self) -> bool:
        """Whether `v` holds vectors itself: then what there is to do is another thing (native_table.py)."""
        return native_table.applies(self)

    def prepared(self, stamp: Iterable[str] | None) -> VectorContext | None:
        """With the table and its column of ours, everything before it committed; None where `v` is a vector already.

        `stamp` are the revisions that say that there is such a column, None where nothing says it.
        """
        with self.db.reading():
            table = requirements.require_table(self)
            if requirements.already_vector(table, self.target):
                return None
            requirements.require_column(table, self.target, self.settings, stamp)
            extension = catalog.require_extension(self.db)
        self.db.take_over()
        return self.with_table(table).with_extension(extension)

    @property
    def cut_over(self) -> Mark | None:
        with self.db.reading():
            table = catalog.table(self.db, self.target.schema, self.target.table)
        return Mark.of(table, self.target) if table else None

    def searched(self) -> VectorContext:
        """With the column that searches go by, whatever the table is."""
        found = self.cut_over
        if self.is_native or (found and found.mode == "swap"):
            return native_table.prepared(self).native
        if found:
            return native_table.prepared(self)
        ready = self.prepared(None)
        assert ready is not None  # it is None for those above only
        return ready

    def refuse_cut_over(self) -> None:
        """Raises MigrationError for a step back from a table that was cut over: its bytes have to be there first; and
        where the last of them could not drop the function of the trigger."""
        with self.db.reading():
            table = catalog.table(self.db, self.target.schema, self.target.table)
            if table and (found := Mark.of(table, self.target)):
                raise MigrationError(found.said(self.target), hint=UNDO_HINT)
            if table and catalog.trigger_enabled(self.db, table.oid, self.target.back):
                raise cutover_mark.changed(self.target, self.target.source)
            requirements.require(self, requirements.BLOCKS.own_function)
            column = table.columns.get(self.target.vector) if table else None
            if column is not None and column.ours:
                requirements.require(self, requirements.BLOCKS.rights)  # for the guard of the last of them
