"""make the sync trigger what this version makes it: after a restore, another owner, another version

The rows are left as they are. Exit code 0 when the trigger does its work; 1 when it can't be made to.
"""

from __future__ import annotations

import argparse

from ..steps import repair
from ..steps.step import Step
from . import output, running


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="also where the marks are gone, as after pg_dump --no-comments: every row is compared first",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the SQL, and change nothing")


def run(options: argparse.Namespace) -> int:
    """Raises MigrationError."""

    def planned(step: Step) -> list[str]:
        with step.db.transaction():
            return repair.planned(step)

    def work(step: Step) -> bool:
        with step.alone():
            if options.adopt:
                repair.adopt(step)
            return repair.repair(step)

    if options.dry_run:
        statements = running.on_postgres(options, planned) or []
        output.write(options, {"statements": statements}, [("", f"{statement};") for statement in statements])
        return 0
    repaired = running.on_postgres(options, work)
    if options.json:
        output.write(options, {"repaired": bool(repaired)}, [])
    return 0
