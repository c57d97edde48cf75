"""One column filled from another inside the server: in physical order, an UPDATE and a commit for a few pages.

The value is computed from the version of the row that is updated: a row that changes meanwhile is looked at again by
the server.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from . import log
from .catalog import Extension, Table
from .database import Database
from .keys import keys_at
from .pace import Pace
from .partitions import Part
from .passes import Steps
from .progress import Progress
from .reading import by_tid

MOST_PAGES = 64  # in a batch: some 14,000 of the smallest rows
PLACES = 2048  # counted for a page: more than any page, of whatever size, has rows
INSIDE = "ctid >= '({page},{item})' AND ctid < '({end_page},{end_item})' AND "
UNLOCKED = "SELECT CAST(ctid AS text) FROM ONLY {table} WHERE " + INSIDE + "{pending} FOR NO KEY UPDATE SKIP LOCKED"
OURS = "ctid = ANY (CAST(CAST(:tids AS text[]) AS tid[])) AND "
# a trigger may keep the row as it was, or change what is written
FILL = """
WITH done AS (
  UPDATE ONLY {table} SET {filled} = {value} WHERE {which} RETURNING {sent}({filled}) = {sent}({value}) AS ok)
SELECT count(*) FROM done WHERE ok
"""


@dataclass
class Walk:
    """Over one table that holds rows; `filled`, `value` (vectors) and `pending` are SQL with the names of `db`."""

    db: Database
    table: Table
    extension: Extension
    part: Part
    filled: str
    value: str
    pending: str
    lock_timeout: str
    most_rows: int
    progress: Progress
    pace: Pace | None = None

    def take(self, last_page: int) -> None:
        place = 0  # a page and a row's place in it, as one number
        steps = Steps(self.db, self.progress.what, MOST_PAGES * PLACES, "places")
        steps.size = PLACES
        while place < last_page * PLACES:
            end = place + steps.size
            try:
                filled = self._batch(place, end, steps)
            except DBAPIError as error:
                if self.part.gone(error):
                    log.notice(f"{self.progress.what}: partition {self.part} is gone")
                    return
                outcome = steps.failed(error, steps.size, can_care=True)
                if outcome != "again":
                    with self.db.transaction():
                        page, item = divmod(place, PLACES)
                        names = keys_at(self.part.at(self.db), self.table, [f"({page},{item})"])
                    self.progress.obstacles.pass_by(outcome, error, names)
                    place = end
                continue
            place = end
            steps.done()
            if filled > self.most_rows:
                steps.size = max(1, steps.size // 4)
            if filled:
                self.progress.add(self.db, filled, 0)
                if self.pace:
                    self.pace.rest(self.progress.what)

    def _batch(self, place: int, end: int, steps: Steps) -> int:
        names = {"sent": "{ext}.vector_send", "filled": self.filled, "value": self.value, "pending": self.pending}
        names = {name: self.db.sql(text, **self.extension.names()) for name, text in names.items()}
        for prefix, number in (("", place), ("end_", end)):
            page, item = divmod(number, PLACES)
            names |= {f"{prefix}page": str(page), f"{prefix}item": str(item)}
        at = self.part.at(self.db)
        with self.db.transaction(batch=True, settings=by_tid(self.progress.activity, self.lock_timeout)):
            steps.heed()
            if not steps.careful:
                return int(at.value(FILL.replace("{which}", INSIDE + "{pending}"), **names))
            tids = [tid for (tid,) in at.rows(UNLOCKED, **names)]
            self.progress.obstacles.lock(1)  # or it would not have come to this
            return int(at.value(FILL.replace("{which}", OURS + "{pending}"), {"tids": tids}, **names))
