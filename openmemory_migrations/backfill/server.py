"""Converts inside the database: no value travels.

By the server's own code, at the pace of a copy, where that can be had (encoding/native.py); else as the trigger does,
slower than the client where the server's processors are the limit. The only way on a distributed table, where each node
converts its own rows: a range of places names rows in each shard.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from ..db import citus
from ..db.context import VectorContext
from ..db.database import Database
from ..db.threads import side_by_side
from ..encoding import native
from ..encoding.native import JOIN
from ..encoding.stored import STORED
from ..encoding.sync_trigger import CONVERT
from ..sql import SQL
from .claims import Claims
from .pace import Pace
from .progress import Progress
from .walk import Filling, fill

MOST_BYTES = 32 * 1024**2  # in a batch: a tenth of a second or two, for as long as its rows are locked
MISSING = "SELECT pg_catalog.to_regprocedure(:name) IS NULL"
VALUE = "{convert}({source}, {dimensions})"


class ServerEngine:
    """`native`: by the server's own code. Of either function nothing stays, but on the nodes of Citus."""

    def __init__(self, ctx: VectorContext, *, native: bool) -> None:
        self.ctx, self.native = ctx, native
        self.function = JOIN if native else CONVERT
        self.names: dict[str, SQL] = {}
        with ctx.db.transaction():
            self.spread = bool(citus.shards(ctx.db, ctx.table.oid))
            if self.spread:
                self.names = {"convert": ctx.db.names["spread_convert"]}
                if ctx.db.value(MISSING, {"name": f"{self.names['convert']}(bytea, integer)"}):
                    CONVERT.make(ctx.db.at(self.names), ctx.extension)

    def walk(self, dimensions: int, workers: list[Claims], progress: Progress, pace: Pace) -> None:
        filling = Filling(
            "{vector}",
            native.value(dimensions) if self.native else VALUE.replace("{dimensions}", str(dimensions)),
            STORED.pending(dimensions),
            "{source}",
            unfit=native.unfit(dimensions) if self.native else STORED.not_finite,
            misfit=native.UNFIT.replace("{value}", "{vector}") if self.native else "{vector} IS NULL",
        )

        most_rows = STORED.batch(MOST_BYTES, dimensions, self.ctx.settings.backfill_batch)

        def convert(db: Database, claims: Claims) -> None:
            of_column = (claims, self.ctx.target.vector)
            db = db.at(self.names)
            with nullcontext() if self.spread else self.function.there(db, self.ctx.extension):
                within = None if self.spread else self.function.here
                fill(self.ctx.by(db), filling, most_rows, progress, pace.on(db), of_column, within)

        side_by_side(self.ctx.db, [partial(convert, claims=claims) for claims in workers])
