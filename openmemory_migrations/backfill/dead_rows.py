"""What a run leaves for vacuum: each row that it has written has a dead version."""

from __future__ import annotations

from .. import log
from ..db import partitions
from ..db.context import TableContext
from ..sql import blocks

BLOCKS = blocks("backfill")


def tell(ctx: TableContext, what: str, rows: int) -> None:
    """Says how many there are, and when they are taken away."""
    if not rows:
        return
    db = ctx.db
    with db.transaction():
        tables = [part.oid for part in partitions.leaves(db, ctx.table.oid)]
        ((left_alone, threshold, naptime),) = db.rows(BLOCKS.autovacuum, {"tables": tables})
    if left_alone:
        detail = "Autovacuum is off" + (f" for {left_alone:,} of {len(tables):,} partitions." if tables[1:] else ".")
    else:
        detail = f"Autovacuum takes them away once more than {threshold:,} are dead; it looks every {naptime}."
    by_hand = left_alone or rows <= threshold
    hint = f"VACUUM (ANALYZE) {db.names['table']};" if by_hand else None
    log.notice(f"{what}: {rows:,} dead row versions are left", detail=detail, hint=hint)
