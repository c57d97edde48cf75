"""What has to hold before a table is cut over. Each refusal says what is missing and how to get it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from .. import log
from ..backfill.leftovers import leftovers
from ..columns import properties
from ..db import catalog, citus, partitions, replication
from ..db.catalog import Table
from ..db.context import TableContext, VectorContext
from ..db.database import Seen
from ..errors import ANEW, INDEX_ANEW, MigrationError
from ..finding import Finding
from ..index import build, choice
from ..index.choice import NoIndex
from ..settings import Settings
from ..sql import quote
from ..steps import interference, repair, requirements
from ..target import Target, derived
from ..verify import verification
from ..verify.equality import Comparison
from . import kept

MENDS = {
    "differs": "UPDATE … SET {source} = {source} for those rows lets the trigger mend them",
    "missing": "openmemory-migrations backfill converts them",
    "stale": "UPDATE … SET {source} = {source} for those rows lets the trigger mend them",
}
CHOICE = (
    "OM_CUTOVER=swap: {vector} becomes {source}, of type vector, as newer OpenMemory expects it; the bytes stay as"
    " {archive}. OM_CUTOVER=drop: {source} and its bytes go, searches use {vector}."
)


def require_mode(settings: Settings, target: Target) -> str:
    """`swap` or `drop`. Raises MigrationError where neither is chosen: there is no default for a step like this."""
    if settings.cutover is None:
        names = {name: quote(getattr(target, name)) for name in ("source", "vector", "archive")}
        raise MigrationError(
            "what the cutover is to do isn't set",
            detail=CHOICE.format_map(names),
            hint="Set OM_CUTOVER to one of them.",
        )
    return settings.cutover


def require(ctx: TableContext) -> None:
    """Everything that can be asked without reading the rows. Raises MigrationError."""
    target, table = ctx.target, ctx.table
    requirements.require_column(table, target, ctx.settings, None)
    requirements.require(ctx, requirements.BLOCKS.rights)
    if citus.shards(ctx.db, table.oid):
        raise MigrationError(
            f"{target} is distributed by Citus, where its rows can't be compared by their places",
            hint="The cutover is for tables of one server; there, keep both columns.",
        )
    column = table.columns[target.vector]
    aside = table.columns.get(target.adopted)
    if aside is not None and aside.set_aside:
        raise MigrationError(
            f"the backfill of {target} has not ended: {quote(target.adopted)} is still there",
            hint="First: alembic upgrade head.",
        )
    if column.dimensions is None:
        raise MigrationError(
            f"column {quote(target.vector)} of {target} has no dimensions",
            hint=f"Set OM_VEC_DIM or OM_TIER, then: {ANEW}.",
        )
    if ctx.settings.cutover == "drop":
        requirements.require(ctx, requirements.BLOCKS.room)  # for the bytes, when it is undone
    require_trigger(ctx)
    _require_index(ctx)
    require_dependents(ctx)
    going = [target.source, target.vector] if ctx.settings.cutover == "swap" else [target.source]
    for name in going:
        ours = (target.sync, target.guard)
        interference.require_none(interference.naming(ctx.db, table, name, ours, "after the cutover"))
    _require_names(ctx)


def require_trigger(ctx: TableContext) -> None:
    """Raises MigrationError where a write could leave another vector than its bytes say."""
    target = ctx.target
    if not catalog.trigger_enabled(ctx.db, ctx.table.oid, target.sync):
        raise MigrationError(
            f"trigger {quote(target.sync)} of {target} is missing or disabled: what is written now has a stale vector",
            hint=f"With OM_SYNC_TRIGGER=on: {repair.REPAIR}. Then the cutover again.",
        )
    for fault in repair.broken(ctx):
        raise fault.error
    interference.require_none(interference.of_sync(ctx))


def _require_index(ctx: TableContext) -> None:
    """An index that searches can use, unless there is to be none or can be none."""
    target = ctx.target
    if verification.valid_index(ctx):
        return
    extension = catalog.require_extension(ctx.db)
    rows = build.count_vectors(ctx.db)
    wanted = choice.plan(target, ctx.settings, extension, ctx.table.columns[target.vector].dimensions, rows)
    if not isinstance(wanted, NoIndex):
        raise MigrationError(
            f"no valid index on {quote(target.vector)} of {target}",
            detail="Searches would read every row.",
            hint=f"First: {INDEX_ANEW}. Or set OM_INDEX=none, if there is to be none.",
        )


def require_dependents(ctx: TableContext) -> None:
    """Raises MigrationError where something hangs on `v` that would be left behind."""
    target = ctx.target
    own = {
        target.sync,
        target.guard,
        target.left,
        *(left_index(target, part) for part in partitions.parts(ctx.db, ctx.table.oid)),
    }
    if found := properties.dependents(ctx.db, ctx.table, target.source, *own):
        raise MigrationError(
            f"what hangs on {quote(target.source)} of {target} would not go over: {'; '.join(found)}",
            hint="Drop it, and create it anew after the cutover for what is there then.",
        )


def of_drop(ctx: TableContext) -> Iterator[Finding]:
    """What goes for ever, with the statement that keeps a copy elsewhere."""
    target = ctx.target
    if ctx.settings.cutover != "drop":
        return
    name = quote(target.schema, derived(target.table, f"_{target.source}_copy"))
    columns = ", ".join(map(quote, (*ctx.table.key, target.source))) if ctx.table.key else "*"
    yield Finding(
        "notice",
        "drop",
        f"OM_CUTOVER is drop: {quote(target.source)} of {target} goes with its bytes",
        "The undo makes them anew from the vectors. Rows that no vector can hold are kept in table"
        f" {quote(target.kept)} only: without that table they can't be had back.",
        "To have a copy, before: CREATE TABLE {} AS SELECT {} FROM {};".format(name, columns, ctx.db.names["table"]),
    )


def warn(ctx: TableContext) -> None:
    """Of what can't be undone, and of those who hear of the table's columns, and can't be asked."""
    for found in of_drop(ctx):
        log.notice(found.message, detail=found.detail, hint=found.hint)
    tables = [part.oid for part in partitions.parts(ctx.db, ctx.table.oid)]
    for (name,) in ctx.db.rows(replication.BLOCKS.publications, {"tables": tables}):
        log.warning(
            f"publication {quote(name)} sends {ctx.target} to its subscribers",
            detail="One whose table has still the columns of before stops with an error at the first row after that.",
            hint="Cut its table over as well before its next row, or take the table out of the publication.",
        )


def _require_names(ctx: TableContext) -> None:
    """No name that is needed is taken."""
    target = ctx.target
    if target.archive in ctx.table.columns:
        raise MigrationError(
            f"{target} has a column {quote(target.archive)} already",
            hint="Rename or drop it: the bytes are kept there, or put back from there.",
        )
    if kept.taken(ctx):
        raise MigrationError(
            f"the name {quote(target.kept)} is taken by something that isn't this package's,"
            " or keeps the rows of another table",
            hint="Rename that.",
        )


def left_index(target: Target, part: partitions.Part) -> str:
    """Of a table that holds rows: the index on those without a vector, for the time until the switch."""
    return replace(target, table=part.name).left


def verify(ctx: VectorContext) -> tuple[int, Seen]:
    """Compares every row to the bit, in one snapshot; returns how many have bytes that no vector can hold, and what
    the switch has to find again."""
    found = verification.compare(ctx)
    if not found.fine:
        raise _wrong(ctx.target, ctx.table, found)
    skipped = sum(found.skipped.values())
    log.notice(
        f"every row of {ctx.target} is verified to the bit: {found.rows:,} rows, {found.equal:,} equal, {skipped:,}"
        f" that no vector can hold, {found.without_source:,} without bytes",
        detail=f"{found.looked_at_again:,} were not right in a snapshot before." if found.looked_at_again else None,
    )
    with ctx.db.transaction():
        require_accepted(ctx, skipped, kept.count(ctx.db), found.skipped)
    return skipped, found.seen


def require_rows(ctx: TableContext) -> int:
    """Refuses what can be seen without comparing every row, before anything is made that takes time; returns how many
    rows have to leave."""
    found = leftovers(ctx)
    with ctx.db.transaction():
        require_accepted(ctx, found.skipped, kept.count(ctx.db), found.reasons)
    return found.skipped


def _wrong(target: Target, table: Table, found: Comparison) -> MigrationError:
    hints = dict.fromkeys(MENDS[kind].format(source=quote(target.source)) for kind in MENDS if kind in found.wrong)
    return MigrationError(
        f"{found.not_right:,} rows of {target} are not right, so nothing is cut over",
        detail=found.problems(table),
        hint=("; ".join(hints) + ". Then the cutover again.") if hints else "Run the same command again.",
    )


def require_accepted(ctx: TableContext, left: int, away: int, reasons: Mapping[str, int] | None = None) -> None:
    """Raises MigrationError unless no row has to leave the table, or as many as OM_ACCEPT_LOSS says, and each can.

    Those count that are `away` already, by a run that was interrupted.
    """
    rows = left + away
    if rows and rows != ctx.settings.accept_loss:
        details = [f"{'; '.join(f'{reason}: {number:,}' for reason, number in reasons.items())}."] if reasons else []
        if away:
            details.append(f"{away:,} are in table {quote(ctx.target.kept)} already.")
        if ctx.settings.accept_loss:
            details.append(f"OM_ACCEPT_LOSS says {ctx.settings.accept_loss:,}.")
        raise MigrationError(
            f"{rows:,} rows of {ctx.target} have bytes that no vector can hold",
            detail=" ".join(details) or None,
            hint=f"Mend or delete them, or have them leave the table with OM_ACCEPT_LOSS={rows}: table"
            f" {quote(ctx.target.kept)} then keeps them, and undoing the cutover puts them back.",
        )
    if left:
        kept.require_none_follows(ctx, partitions.parts(ctx.db, ctx.table.oid), left)


__all__ = [
    "left_index",
    "of_drop",
    "require",
    "require_accepted",
    "require_dependents",
    "require_mode",
    "require_rows",
    "require_trigger",
    "verify",
    "warn",
]
