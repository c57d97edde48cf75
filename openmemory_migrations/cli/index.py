"""build the vector index that the settings want, or put it in the place of another, while searches go on

For a table that was empty or small when the chain built its index, or for other OM_INDEX settings. Exit code 0 when the
wanted index is in place and valid, or OM_INDEX is none and there is none; 1 when it can't be had.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..index import replacement
from ..steps import finalize
from ..steps.step import Step
from . import output, running


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)
    parser.add_argument("--rebuild", action="store_true", help="also where the index is as wanted: lists for its rows")


def run(options: argparse.Namespace) -> int:
    """Raises MigrationError."""

    def work(step: Step) -> dict[str, Any]:
        with step.alone():
            return _placed(step, rebuild=options.rebuild)

    done = running.on_postgres(options, work)
    if options.json:
        output.write(options, done or {"index": None, "built": False}, [])
    return 0


def _placed(step: Step, *, rebuild: bool) -> dict[str, Any]:
    ctx = step.searched()
    if ctx.settings.index == "none":
        finalize.downgrade(ctx)
        return {"index": None, "built": False}
    plan, built = replacement.replace(ctx, rebuild=rebuild)
    if built:
        finalize.advise(ctx, plan)
    return {
        "index": ctx.target.index,
        "built": built,
        "method": plan.method,
        "opclass": plan.opclass,
        "options": plan.options,
        "query": plan.query,
    }
