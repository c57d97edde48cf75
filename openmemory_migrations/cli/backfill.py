"""convert what is pending, without Alembic: any number of these, anywhere, share the work, beside the revision too

The step that adds the column comes first, the revision afterwards: it finds little or nothing to do, and builds on it.
"""

from __future__ import annotations

import argparse

from ..backfill.leftovers import Leftovers
from ..steps import backfill
from ..steps.step import Step
from . import output, running


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)


def run(options: argparse.Namespace) -> int:
    """0 when nothing is left that could be converted, but for rows that OM_ON_BAD_ROWS=skip passes by.

    Raises MigrationError.
    """

    def work(step: Step) -> Leftovers | None:
        with step.beside_others():
            ready = step.prepared(None)
            return backfill.upgrade(ready, last=False) if ready else None

    left = running.on_postgres(options, work)
    if options.json:
        skipped = []
        if left:
            keys = left.examples
            skipped = [{"reason": r, "rows": rows, "keys": keys.get(r, [])} for r, rows in left.reasons.items()]
        output.write(options, {"left": left.convertible + left.kept if left else 0, "skipped": skipped}, [])
    return 1 if left and left.convertible else 0
