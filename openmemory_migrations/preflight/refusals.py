"""Whatever a step would refuse, and every right that it needs: all of it at once, where a step stops at the first.

Questions and words are the steps' own wherever they ask before they change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..backfill import engines, pace
from ..db import catalog, partitions
from ..db.context import Context, TableContext
from ..errors import MigrationError
from ..finding import Finding
from ..sql import blocks
from ..steps import interference, requirements
from ..target import VERSION_TABLE

BLOCKS = blocks("preflight")


def of_the_table(ctx: TableContext, stamped: list[str] | None) -> Iterator[Finding]:
    target = ctx.target
    for block in requirements.OF_TABLE:
        yield from requirements.unmet(ctx, block)
    if ctx.settings.backfill_max_lag is not None:
        yield from _refused("rights", lambda: pace.require_sight(ctx.db))
    yield from _refused("partitions", lambda: partitions.require_whole(ctx.db, ctx.table.oid))
    yield from _engine(ctx)
    column = ctx.table.columns.get(target.vector)
    if stamped:
        yield from _refused("stamp", lambda: requirements.require_column(ctx.table, target, ctx.settings, stamped))
    elif column is not None and column.ours:
        yield from _refused("dimensions", lambda: requirements.agree(column, ctx.settings, target))
    aside = ctx.table.columns.get(target.adopted)
    adopting = (column is not None and not column.ours) or (aside is not None and aside.set_aside)
    for problem in interference.of_sync(ctx):
        yield replace(Finding.of("interference", problem), severity="error" if adopting else "warning")


def of_the_version_table(ctx: Context) -> Iterator[Finding]:
    yield from _refused("rights", lambda: requirements.require_version_table(ctx.db, ctx.target.schema, VERSION_TABLE))


def _engine(ctx: TableContext) -> Iterator[Finding]:
    try:
        engine = engines.choose(ctx, catalog.extension(ctx.db))
    except MigrationError as error:
        yield Finding.of("engine", error)
        return
    yield from _refused("rights", lambda: engines.require_temporary(ctx, engine))


def _refused(code: str, require: Callable[[], object]) -> Iterator[Finding]:
    try:
        require()
    except MigrationError as error:
        yield Finding.of(code, error)
