"""Second step: fills `v_vector` from `v` in batches, each committed by itself.

An engine goes over the table, pass after pass, until one statement with one snapshot finds nothing that could be
converted: what another transaction moves past it is found by the next pass.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Protocol

from .. import log
from ..backfill import claims, dead_rows, engines
from ..backfill.claims import Claim, Claims
from ..backfill.client import ClientEngine
from ..backfill.leftovers import Leftovers, leftovers
from ..backfill.pace import Pace
from ..backfill.passes import Obstacles, in_the_way, passes, until_none_is_left
from ..backfill.progress import Progress
from ..backfill.server import ServerEngine
from ..backfill.walk import Filling, fill
from ..columns import guard
from ..db import catalog, citus, locks
from ..db.catalog import Table
from ..db.context import Context, VectorContext
from ..db.database import Database
from ..db.keys import SHOWN_KEYS, keys_where
from ..encoding import dimensions
from ..encoding.stored import STORED
from ..errors import Changed, MigrationError
from ..sql import blocks, quote
from . import interference, statements

BLOCKS = blocks("steps")

MOST_CARRIED = 14_000  # rows in a batch
PATIENCE = 60  # seconds in which what another run has claimed is left to it
POLL = 0.1  # seconds between two looks at whether it has given that back

ADOPTED_ONLY = "{source} IS NULL AND {vector} IS NULL AND {adopted} IS NOT NULL"
CARRYING = Filling("{vector}", "{adopted}", ADOPTED_ONLY, "{ext}.vector_send({adopted})")
WITHOUT_VECTOR = (
    f"CASE WHEN {{vector}} IS NULL AND {STORED.length} = ANY (:values) THEN NOT {STORED.not_finite} ELSE false END"
)


class Engine(Protocol):
    def walk(self, dimensions: int, workers: list[Claims], progress: Progress, pace: Pace) -> None:
        """Goes once over all pending rows of that many dimensions, with so many workers."""


def upgrade(ctx: VectorContext, *, last: bool) -> Leftovers:
    """Converts what is pending and reports what can't be. Raises MigrationError for that if OM_ON_BAD_ROWS is fail.

    The `last` of any number of runs also puts values without source into our column and drops the adopted one.
    """
    target = ctx.target
    with ctx.db.transaction():
        interference.warn(interference.of_sync(ctx))
        for _, problem in interference.of_updates(ctx, ctx.settings.lock_timeout_ms):
            raise problem
    left = run(ctx)
    aside = ctx.table.columns.get(target.adopted)
    if aside is not None and aside.set_aside:
        if last:
            carry_over(ctx)
        else:
            log.notice(f"{quote(target.adopted)} of {target} is kept until the revision has run")
    if left.dim_differs:
        log.notice(f"column dim disagrees with the bytes in {left.dim_differs:,} rows of {target}; the bytes decided")
    if left.in_the_way:
        _refused(ctx, left.kept, left.in_the_way)
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
        if ctx.settings.on_bad_rows == "fail":
            raise MigrationError(message, detail=f"{left.summary()}. All others are converted.", hint=hint)
        log.warning(message, detail=f"{left.summary()}.", hint=hint)
    return left


def _refused(ctx: Context, rows: int, detail: str) -> None:
    """For rows whose bytes are a vector: that they are passed by has to be said, a default doesn't say it."""
    message = f"{rows:,} rows of {ctx.target} could not be converted, though their bytes are vectors"
    if ctx.settings.on_bad_rows == "skip" and "on_bad_rows" in ctx.settings.given:
        log.warning(message, detail=detail)
        return
    raise MigrationError(
        message,
        detail=f"{detail} All others are converted.",
        hint="Mend those rows, or what refuses them, then run the same command again; or set OM_ON_BAD_ROWS=skip.",
    )


def run(ctx: VectorContext) -> Leftovers:
    """Converts all that can be converted, logs progress, and returns what is left with its reasons.

    Without the trigger a busy application leaves new rows behind for ever: from the second pass on, only what a pass
    has come upon keeps it from being the last.
    """
    db, table = ctx.db, ctx.table
    fixed = table.columns[ctx.target.vector].dimensions
    what = f"backfill {ctx.target.table}"
    with db.transaction():
        followed = catalog.trigger_enabled(db, table.oid, ctx.target.sync)
        pace = Pace(db, ctx.settings)
        chosen = engines.choose(ctx, ctx.extension)
        engines.require_temporary(ctx, chosen)
    engine: Engine = ClientEngine(ctx) if chosen.name == "client" else ServerEngine(ctx, native=chosen.name == "native")
    left = Leftovers(0, Counter(), {}, 0)
    done, written = 0, 0  # passes, rows
    said = bool(ctx.settings.backfill_engine)

    def once(obstacles: Obstacles) -> tuple[int, int]:
        nonlocal left, done, written, said
        heeded = True
        started: dict[int, Progress] = {}  # with its waits for other runs
        while True:
            waiting: set[Claim] = set()
            for size in [fixed] if fixed else _sizes(db):
                pending = partial(_pending, size=size)
                workers = [Claims(heeded) for _ in range(ctx.settings.backfill_workers)]
                with db.transaction(snapshot=True):
                    rows = pending(db)
                told = (0, 0) if done else None
                progress = started.setdefault(size, Progress(what, rows, pending, told=told, obstacles=obstacles))
                progress.others = partial(claims.of_others, workers)
                if rows and not said:
                    log.notice(f"{what}: {chosen}")
                    said = True
                if rows:
                    with progress.shown():
                        engine.walk(size, workers, progress, pace)
                progress.look(db, over=True)
                progress.tell()
                waiting |= claims.of_others(workers)
            if not waiting:
                break
            log.notice(f"{what}: another run is at work on a part of the table; waiting for it")
            with progress.shown():
                heeded = _given_back(db, waiting, progress)
        done += 1
        converted = sum(progress.converted for progress in started.values())
        written += converted
        left = leftovers(ctx)
        if done >= 2 and not followed:
            return 0, min(left.convertible, obstacles.rows + obstacles.locked)
        return converted, left.convertible

    obstacles, in_way = passes(db, table.oid, what, once)
    dead_rows.tell(ctx, what, written)
    if in_way:
        detail = in_the_way(obstacles, in_way, partial(_names, db, table, fixed))
        left = replace(left, convertible=left.convertible - in_way, kept=in_way, in_the_way=detail)
    return left


def _names(db: Database, table: Table, fixed: int | None, most: int) -> list[str]:
    """Of rows that are still without a vector, though they have the length of one."""
    octets = [STORED.octets(size) for size in ([fixed] if fixed else _sizes(db))]
    with db.transaction():
        return keys_where(db, table, WITHOUT_VECTOR, octets, most=most)


def _given_back(db: Database, parts: set[Claim], progress: Progress) -> bool:
    """Waits until no other run has a claim on these parts, and says whether that has come to pass."""
    over = time.monotonic() + PATIENCE
    while time.monotonic() < over:
        with db.transaction():
            if not parts & claims.held(db):
                return True
        if progress.bar:
            progress.show(db)
        db.stop.sleep(POLL)
    return False


def carry_over(ctx: VectorContext) -> None:
    """Moves the values without source from the adopted column to ours, then drops the adopted column."""

    def carry_over() -> None:
        _carry_over(ctx)
        with guard.against(ctx, guard.ADOPTED):
            _drop_adopted(ctx)

    locks.decided(carry_over)


def _carry_over(ctx: VectorContext) -> None:
    db, target, table = ctx.db, ctx.target, ctx.table
    moved = 0
    what = "carrying values over"
    with db.transaction():
        spread = citus.shards(db, table.oid)

    def at_once() -> int:
        db.as_host()
        return int(db.run("UPDATE {table} SET {vector} = {adopted} WHERE " + ADOPTED_ONLY).rowcount)

    def once(obstacles: Obstacles) -> tuple[int, int]:
        nonlocal moved
        with db.transaction(snapshot=True):
            pending = _to_carry(db)
        progress = Progress(what, pending, _to_carry, doing=what, obstacles=obstacles)
        if pending and spread:  # no place to go by; rows without source are few
            progress.converted = locks.retried(db, ctx.settings.lock_timeout_ms, table.oid, what, at_once)
        elif pending:
            fill(ctx, CARRYING, MOST_CARRIED, progress)
        moved += progress.converted
        return progress.converted, pending

    until_none_is_left(
        db,
        table,
        what,
        once,
        pending=ADOPTED_ONLY,
        otherwise=f"values of {quote(target.adopted)} of {target} can't be carried over, so it stays",
        hint="Mend what keeps them as they are, then run the same command again.",
    )
    if moved:
        log.notice(
            f"{moved:,} values without source in {quote(target.source)} carried over from {quote(target.adopted)}"
        )


def _to_carry(db: Database) -> int:
    return int(db.value("SELECT count(*) FROM {table} WHERE " + ADOPTED_ONLY))


def _drop_adopted(ctx: VectorContext) -> None:
    db, target = ctx.db, ctx.target
    with db.transaction(snapshot=True) as seen:
        if _to_carry(db):
            raise Changed(f"values have come to {quote(target.adopted)} of {target}")
        _refuse_loss(ctx)
        interference.require_none(interference.of_sync(ctx))

    def drop() -> None:
        statements.run(ctx, statements.BLOCKS.remove_adopted)

    what = f"dropping {quote(target.adopted)} of {target}"
    locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, drop, seen)


def _refuse_loss(ctx: VectorContext) -> None:
    """Raises MigrationError for values of the adopted column that are nowhere else; in the snapshot that is open."""
    target = ctx.target
    names = ctx.extension.names()
    lost = int(ctx.db.value("SELECT count(*) FROM {table} WHERE " + BLOCKS.lost, **names))
    if lost > ctx.settings.accept_loss:
        such = ", ".join(keys_where(ctx.db, ctx.table, BLOCKS.lost, (), SHOWN_KEYS, **names))
        raise MigrationError(
            f"{lost:,} values of {quote(target.adopted)} of {target} would be lost, so it stays",
            detail=f"Such as {such}: {quote(target.source)} holds bytes that no vector can hold, or a trigger changes"
            " the value on its way.",
            hint=f"Mend {quote(target.source)} in those rows, or disable that trigger; or accept the loss with"
            f" OM_ACCEPT_LOSS={lost}.",
        )


def _pending(db: Database, size: int) -> int:
    return int(db.value("SELECT count(*) FROM {table} WHERE " + STORED.pending(size)))


def _sizes(db: Database) -> list[int]:
    """The dimensions that pending rows have, for a column without dimensions."""
    with db.transaction(snapshot=True):
        return dimensions.sizes(db, "FROM {table} WHERE {vector} IS NULL")
