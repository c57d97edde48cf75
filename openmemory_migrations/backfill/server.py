"""Converts inside the database: no value travels.

By the server's own code, at the pace of a copy, where that can be had (encoding/native.py); else by the SQL function
that the trigger has, slower than the client where the server's processors are the limit. The only way on a
distributed table, where each node converts its own rows: a range of places names rows in each shard.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from ..db.context import VectorContext
from ..db.database import Database
from ..db.threads import side_by_side
from ..encoding import native, sync_trigger
from ..encoding.stored import STORED
from .claims import Claims
from .pace import Pace
from .progress import Progress
from .walk import Filling, fill

MOST_BYTES = 32 * 1024**2  # in a batch: a tenth of a second or two, for as long as its rows are locked
VALUE = "{convert}({source}, {dimensions})"


class ServerEngine:
    """`native`: by the server's own code, of which nothing stays."""

    def __init__(self, ctx: VectorContext, *, native: bool) -> None:
        self.ctx, self.native = ctx, native
        if not native:
            sync_trigger.ensure_convert(ctx.db, **ctx.extension.names())

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
            with native.there(db, self.ctx.extension) if self.native else nullcontext():
                within = native.here if self.native else None
                fill(self.ctx.by(db), filling, most_rows, progress, pace.on(db), of_column, within)

        side_by_side(self.ctx.db, [partial(convert, claims=claims) for claims in workers])
