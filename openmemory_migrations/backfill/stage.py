"""Gives rows their vectors, or their bytes, from a binary COPY into a temporary table that keeps nothing.

Its trigger updates the rows of one group after the other, by tid and xmin, with a plan that is made once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..db.database import Database
from ..db.keys import SUM
from ..sql import FUNCTION, SQL, Fragment, blocks, fill, literal, quote, unquote
from .passes import OF_OVERRULED
from .reader import Way

BLOCKS = blocks("backfill")

STAGE = "openmemory_migrations_stage"
REWRITTEN = "OM002"  # SQLSTATE: to be said of a batch only with sums of what is read
# of a transaction: how many rows have got their value, and the places of those that a trigger has kept from it
COUNTER, KEPT = "openmemory_migrations.written", "openmemory_migrations.kept"
CREATE = (
    "CREATE TEMPORARY TABLE {stage} (filenode oid, tids tid[], versions xid[], elements {element}[])",
    BLOCKS.create_stage_function,
    "CREATE TRIGGER {stage} BEFORE INSERT ON pg_temp.{stage} FOR EACH ROW EXECUTE FUNCTION pg_temp.{stage}()",
    # or it would not fire where session_replication_role is replica
    "ALTER TABLE pg_temp.{stage} ENABLE ALWAYS TRIGGER {stage}",
)
DROP = ("DROP TABLE pg_temp.{stage}", "DROP FUNCTION pg_temp.{stage}()")


@dataclass(frozen=True)
class Triggers:
    """What others' triggers may do to the value that an UPDATE of a column writes: change the row before it is written,
    or write it again when the UPDATE is done."""

    before: bool = False
    after: bool = False


def others_triggers(db: Database, column: str) -> Triggers:
    """For the column as SQL quotes it; in a transaction."""
    ((before, after),) = db.rows(BLOCKS.triggers, {"table": db.names["table"], "written": unquote(column)})
    return Triggers(before, after)


class Stage:
    """Made with the first batch and dropped at the end; with every batch where a pooler may change the session."""

    def __init__(self, db: Database, ext: Mapping[str, SQL], way: Way, *, with_sums: bool = False) -> None:
        self._db = db
        self.with_sums = with_sums
        self._lasting = not db.pooled
        self._made = False
        names: dict[str, Fragment] = {**db.names, **ext, "stage": quote(STAGE)}
        names |= {"table_text": db.names["table"], "counter": literal(COUNTER), "kept": literal(KEPT)}
        names |= {"overruled": literal(OF_OVERRULED), "rewritten": literal(REWRITTEN)}
        names |= {"written": fill(way.written, names), "element": fill(way.element, names)}
        names |= {"read": fill(way.value, names)}
        triggers = others_triggers(db, str(names["written"]))
        if triggers == Triggers():
            names["write"] = fill(BLOCKS.counted, names)
        else:
            # a batch would take a quarter longer with them (measured)
            sum_ = SUM.format(it="pg_catalog.textsend({it}::text)")
            now, then = sum_.format(it="now"), sum_.format(it="t.{read}")
            names |= {"sums": SQL(f"pg_catalog.array_agg({now})" if with_sums else "NULL"), "sum": fill(then, names)}
            names |= {"before": SQL(""), "ok": True, "spoiled": False, "lock": SQL(""), "joined": SQL("")}
            if triggers.before:
                names |= {
                    "before": fill(BLOCKS.before_update, names),
                    # by bits: 0 is equal to -0
                    "ok": fill("pg_catalog.record_image_eq(ROW(t.{written}), ROW(s.element))", names),
                    "spoiled": SQL("NOT pg_catalog.bool_and(ok AND pg_catalog.record_image_eq(ROW(was), ROW(now)))"),
                    "lock": fill(BLOCKS.lock_staged, names),
                    "joined": SQL("LEFT JOIN old USING (was_at)"),
                }
            names["write"] = fill(BLOCKS.compared, names)
        self._names = names | {"tag": FUNCTION}

    def write(self, payload: bytes) -> tuple[int, list[str]]:
        """Writes what codec.encode() has made of rows, inside the transaction that is open.

        Returns how many rows have got their value, and the places of those that a trigger has kept as they were; a row
        that was changed or deleted since is neither.
        """
        if not self._made:
            self._run(CREATE)
        self._db.copy_in(STAGE, payload)
        if not self._lasting:
            self._run(DROP)
        ((written, kept),) = self._db.rows(
            "SELECT current_setting(:counter, true), current_setting(:kept, true)", {"counter": COUNTER, "kept": KEPT}
        )
        return int(written or 0), (kept or "").split()

    def committed(self) -> None:
        self._made = self._lasting

    def drop(self) -> None:
        if self._made and self._db.usable:
            with self._db.transaction():
                self._run(DROP)
            self._made = False

    def _run(self, statements: tuple[str, ...]) -> None:
        for statement in statements:
            self._db.run(statement, **self._names)
