"""convert what is pending, without Alembic: any number of these, anywhere, share the work, beside the revision too

The step that adds the column comes first, the revision afterwards: it finds little or nothing to do, and builds on it.
"""

from __future__ import annotations

import argparse

from .. import running
from ..steps import Step

arguments = running.arguments


def run(options: argparse.Namespace) -> int:
    """0 when nothing is left that could be converted. Raises MigrationError."""

    def work(step: Step) -> int:
        with step.beside_others():
            ready = step.prepared(None)
            left = step.backfill(*ready, last=False) if ready else None
        return 1 if left and left.convertible else 0

    return running.on_postgres(options, work) or 0
