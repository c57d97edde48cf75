"""Where a migration stands, seen in one snapshot and read-only: for the commands that report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..backfill.leftovers import NOT_FINITE, by_length, by_reading
from ..columns import cutover_mark, guard
from ..columns.cutover_mark import Mark
from ..cutover import kept, preparations
from ..db import catalog, partitions
from ..db.catalog import Index
from ..db.context import Context, TableContext
from ..db.database import APPLICATION_NAME, Database
from ..encoding import back_trigger
from ..encoding.stored import STORED
from ..errors import MigrationError
from ..finding import Finding
from ..index import build_progress
from ..settings import Settings
from ..sql import SQL, blocks, quote
from ..steps import native_table, repair, requirements
from ..target import CUTOVER_VERSION_TABLE, VERSION_TABLE, Target
from ..verify import verification

BLOCKS = blocks("preflight")

LOOK_INTO = 10_000  # rows without a vector that are read to tell NaN from what is still to be converted


@dataclass(frozen=True)
class Rows:
    """`pending` can be converted, or may be: of 10,000 rows, and the first that can, on nothing is read; `skipped`
    can't."""

    total: int
    converted: int
    pending: int
    skipped: Mapping[str, int]
    without_source: int  # v is NULL


@dataclass(frozen=True)
class CutOver:
    """`without_bytes` have a vector and no bytes beside it, which is what undoing the cutover would rebuild.

    `changed` is what isn't any more as the cutover has left it, and what keeps it from being undone.
    """

    said: str
    mode: str
    undoing: bool  # begun, and not finished
    rows: int
    vectors: int
    without_bytes: int
    index: Index | None  # that searches can use
    kept: int | None  # rows in the table for those that no vector can hold; None where they may not be read
    changed: MigrationError | None = None


@dataclass(frozen=True)
class State:
    """`revisions` are those stamped in our own version table, None where there is no such table: a host's chain."""

    target: Target
    revisions: list[str] | None
    column: str | None  # its type
    dimensions: int | None
    ours: bool
    trigger: bool
    rows: Rows | None  # None before there is a column
    indexes: list[Index] = field(default_factory=list)
    build: str | None = None
    runs: list[tuple[int, str, str]] = field(default_factory=list)  # process, what it says, since when
    source_is_vector: bool = False  # then `column` is the source
    to_be: int | None = None  # dimensions that such a column has, or is to have
    found_by_application: bool = False
    cut_over: CutOver | None = None
    left_by_cutover: list[str] = field(default_factory=list)  # that was killed before its switch
    cutover_revisions: list[str] | None = None  # as `revisions`, of the cutover
    guards: list[str] = field(default_factory=list)  # triggers of runs that are no more: without any effect
    faults: list[Finding] = field(default_factory=list)  # of the sync trigger
    aside: bool = False  # an adopted column is still there, from which values without source are to be carried over

    @property
    def index(self) -> Index | None:
        return next((index for index in self.indexes if index.name == self.target.index), None)

    @property
    def left(self) -> list[Index]:
        """What a run that replaces the index is at, or has left if it was interrupted."""
        names = (self.target.new.index, self.target.old.index)
        return [index for index in self.indexes if index.name in names]


def look(ctx: Context) -> State:
    """Raises MigrationError where the table is not one that can be migrated."""
    with ctx.db.transaction():
        requirements.require_table(ctx)  # before the lock on it, which says less of why there can't be one
    with ctx.db.transaction(snapshot=True):
        table = requirements.require_table(ctx)
        if found := Mark.of(table, ctx.target):
            return _cut_over(ctx.with_table(table), found)
        if catalog.trigger_enabled(ctx.db, table.oid, ctx.target.back):
            raise cutover_mark.changed(ctx.target, ctx.target.source)
        to_be = None
        if native := table.columns[ctx.target.source].is_vector:
            to_be = native_table.examine(ctx.with_table(table))[0].size
            ctx = ctx.by(ctx.db.at(ctx.target.native.names())).of(ctx.target.native)
        column = table.columns.get(ctx.target.vector)
        tables = [part.oid for part in partitions.parts(ctx.db, table.oid)]
        aside = table.columns.get(ctx.target.adopted)
        column_is = {"schema": ctx.target.schema, "table": ctx.target.table, "column": ctx.target.vector}
        phase = build_progress.phase(ctx.db.connection, tables)
        return State(
            target=ctx.target,
            revisions=revisions(ctx.db, ctx.settings),
            column=column.type_shown if column else None,
            dimensions=column.dimensions if column else None,
            ours=bool(column and column.ours),
            trigger=catalog.trigger_enabled(ctx.db, table.oid, ctx.target.typing if native else ctx.target.sync),
            rows=_own_rows(ctx.with_table(table))
            if native
            else _rows(ctx.with_table(table))
            if column and column.ours
            else None,
            indexes=list(catalog.own_indexes(ctx.db, ctx.target, table.oid, *ctx.target.indexes).values()),
            build=str(phase) if phase else None,
            runs=[tuple(row) for row in ctx.db.rows(BLOCKS.runs, {"ours": APPLICATION_NAME + "%"})],
            source_is_vector=native,
            to_be=to_be,
            found_by_application=ctx.db.value(BLOCKS.detected, column_is),
            left_by_cutover=[] if native else preparations.left(ctx.with_table(table)),
            guards=guard.there(ctx.db),
            cutover_revisions=revisions(ctx.db, ctx.settings, CUTOVER_VERSION_TABLE),
            aside=bool(aside and aside.set_aside),
            faults=[] if native else repair.faults(ctx.with_table(table)),
        )


def _cut_over(ctx: TableContext, found: Mark) -> State:
    db, target, table = ctx.db, ctx.target, ctx.table
    now = found.now(target)
    column = table.columns[now.vector]
    at = db.at({"vector": quote(now.vector), "source": quote(now.source)})
    has_bytes = now.source in table.columns
    ((rows, vectors, without),) = at.rows(
        "SELECT count(*), count({vector}), count(*) FILTER (WHERE {vector} IS NOT NULL AND {bytes} IS NULL)"
        " FROM {table}",
        bytes=quote(now.source) if has_bytes else SQL("NULL"),
    )
    index = verification.valid_index(ctx.of(now))
    kept_rows, lost = _kept(ctx, found)
    return State(
        target=target,
        revisions=revisions(db, ctx.settings),
        column=column.type_shown,
        dimensions=column.dimensions,
        ours=False,
        trigger=catalog.trigger_enabled(db, table.oid, target.back),
        rows=None,
        indexes=[index] if index else [],
        runs=[tuple(row) for row in db.rows(BLOCKS.runs, {"ours": APPLICATION_NAME + "%"})],
        cut_over=CutOver(
            found.said(target),
            found.mode,
            back_trigger.follows(ctx, table.oid),
            rows,
            vectors,
            without,
            index,
            kept_rows,
            _changed(ctx, found) or lost,
        ),
        cutover_revisions=revisions(db, ctx.settings, CUTOVER_VERSION_TABLE),
    )


def changed(ctx: TableContext) -> MigrationError | None:
    """What isn't any more as a cutover has left it, and keeps that from being undone, or rows that one has taken out
    which was interrupted; in a transaction that is open."""
    found = Mark.of(ctx.table, ctx.target)
    if found:
        return _changed(ctx, found) or _kept(ctx, found)[1]
    try:
        rows = kept.count(ctx.db)
    except MigrationError as error:
        return error
    if not rows:
        return None
    return MigrationError(
        f"{rows:,} rows of {ctx.target} are in table {quote(ctx.target.kept)}, and not in their own",
        hint=f"{cutover_mark.UNDO} brings them back; {cutover_mark.DO} goes on with a cutover that was interrupted.",
    )


def _kept(ctx: TableContext, found: Mark) -> tuple[int | None, MigrationError | None]:
    rows = None
    try:
        rows = kept.count(ctx.db)
        kept.require(ctx, found.kept)
    except MigrationError as error:
        return rows, error
    return rows, None


def _changed(ctx: TableContext, found: Mark) -> MigrationError | None:
    target, table = ctx.target, ctx.table
    try:
        found.require_dimensions(table, target)
        found.require_names(table, target)
    except MigrationError as error:
        return error
    wrong = repair.back_faults(ctx)
    return wrong[0].error if wrong else None


def revisions(db: Database, settings: Settings, name: str = VERSION_TABLE) -> list[str] | None:
    """Those stamped in our own version table, None where there is no such table."""
    if not catalog.relation_exists(db, settings.pg_schema, name):
        return None
    table = quote(settings.pg_schema, name)
    if not db.value("SELECT pg_catalog.has_table_privilege(CAST(:name AS regclass), 'SELECT')", {"name": table}):
        role = quote(db.value("SELECT current_user"))
        raise MigrationError(
            f"role {role} may not read version table {table}",
            hint=f"GRANT SELECT ON {table} TO {role}; or, where the table has got another owner, as a role that may act"
            f" for both: {repair.REPAIR}.",
        )
    return sorted(row[0] for row in db.rows("SELECT version_num FROM {versions}", versions=table))


def _own_rows(ctx: TableContext) -> Rows:
    """Where `v` holds vectors itself: `converted` are those that have their dimensions."""
    total, filled = ctx.db.rows("SELECT count(*), count({source}) FROM {table}")[0]
    typed = ctx.table.columns.get(ctx.target.typed)
    if ctx.table.columns[ctx.target.source].dimensions:
        done = filled
    else:
        done = ctx.db.value("SELECT count({typed}) FROM {table}") if typed and typed.typed else 0
    return Rows(total, done, filled - done, {}, total - filled)


def _rows(ctx: TableContext) -> Rows:
    fixed = ctx.table.columns[ctx.target.vector].dimensions
    total, converted, without = ctx.db.rows(
        "SELECT count(*), count({vector}), count(*) FILTER (WHERE {source} IS NULL) FROM {table}"
    )[0]
    skipped: Counter[str] = Counter()
    pending = 0
    for octets, rows, _ in by_length(ctx.db):
        if octets is None:
            continue
        reason = STORED.problem(octets, fixed)
        bad = by_reading(ctx.db, ctx.table, STORED.dimensions(octets), LOOK_INTO).bad if reason is None else rows
        pending += rows - bad
        if bad:
            skipped[reason or NOT_FINITE] += bad
    return Rows(total, converted, pending, dict(skipped), without)
