"""prove that every vector is its bytes to the bit, and measure what searches find; reads only

Exit code 0 when every row is right and --fail-under, if it is given, holds; 1 when not, or when --max-seconds were over
before that was known. Rows that can't be converted have no vector, as they should: they are counted, and no failure.
Where vectors never were bytes, or have been cut over, nothing is compared, and searches are measured; exit code 1 where
they can't be, as then nothing was looked at. It takes one snapshot, as pg_dump does, and a second one where rows of the
first were not right.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..db.catalog import Extension, Table
from ..db.signals import TimeUp
from ..errors import TryAgain, UsageError
from ..finding import Finding
from ..preflight import state
from ..steps import repair
from ..steps.step import Step
from ..target import Target
from ..verify import advice, verification
from ..verify.verification import Asking, Proof, See
from . import output, presentation, running

T = TypeVar("T")


class OutOfTime(TryAgain):
    """The seconds that were given are over before there is anything to say."""


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)
    proof_arguments(parser)


def proof_arguments(parser: argparse.ArgumentParser) -> None:
    search_arguments(parser)
    parser.add_argument("--sample", type=int, metavar="N", help="compare so many rows or some more; default: all")
    parser.add_argument(
        "--fail-under",
        type=float,
        metavar="X",
        help="exit code 1 when the recall of a session with its default settings is below this, 0 to 1",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        metavar="N",
        help="hold a snapshot no longer than this; what is not known then is not right",
    )


def search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=100, metavar="N", help="searches to measure; default: 100")
    parser.add_argument("--k", type=int, default=10, help="rows that a search asks for; default: 10")
    parser.add_argument(
        "--recall", type=float, default=0.95, metavar="X", help="the recall that is wanted, 0 to 1; default: 0.95"
    )


def asking(options: argparse.Namespace) -> Asking:
    """Raises UsageError for what can't be meant."""
    sample, under, most = (getattr(options, name, None) for name in ("sample", "fail_under", "max_seconds"))
    for name, value, low, high in (
        ("--k", options.k, 1, 1000),
        ("--queries", options.queries, 0, 10_000),
        ("--sample", sample, 1, 10**12),
        ("--recall", options.recall, 0, 1),
        ("--fail-under", under, 0, 1),
        ("--max-seconds", most, 0, 10**7),
    ):
        if value is not None and not low <= value <= high:
            raise UsageError(f"{name} is {value}", hint=f"It must be from {low:,} to {high:,}.")
    if under is not None:
        require_queries(options)
    return Asking(options.queries, options.k, options.recall, sample, most)


def require_queries(options: argparse.Namespace) -> None:
    if not options.queries:
        raise UsageError("--queries is 0, and this needs searches to measure", hint="Leave --queries out.")


def require_postgres(options: argparse.Namespace) -> None:
    """Where there is none. Raises UsageError for a --fail-under, which nothing could be held against."""
    if options.fail_under is not None:
        raise UsageError(
            "there is no Postgres in which searches could be measured", hint="OM_METADATA_BACKEND is sqlite."
        )


def run(options: argparse.Namespace) -> int:
    """Raises MigrationError."""
    wanted = asking(options)

    def work(step: Step) -> Verdict:
        return prove(step, wanted, options)

    verdict = running.on_postgres(options, work)
    if verdict is None:
        require_postgres(options)
        return output.nothing(options)
    _, target = running.configured(options)
    output.write(options, verdict.data(target), verdict.lines(target))
    return 0 if verdict.fine else 1


def prove(step: Step, wanted: Asking, options: argparse.Namespace, see: See = bool) -> Verdict:
    """Raises TryAgain where the seconds that there are were over before the table could be looked at."""
    ctx, wanted = in_time(step, wanted, options, step.searched)
    found = verification.prove(ctx, wanted, see)
    with step.db.transaction():
        changed = state.changed(step.with_table(ctx.table))
        findings = repair.broken(step.with_table(ctx.table))
    if changed:
        findings.append(Finding.of("cutover", changed))
    return judge(ctx.table, ctx.extension, found, options, findings)


def in_time(step: Step, wanted: Asking, options: argparse.Namespace, look: Callable[[], T]) -> tuple[T, Asking]:
    """What `look` finds, and what is asked for in the seconds that are left then. Raises TryAgain where none are."""
    began, seconds = time.monotonic(), wanted.max_seconds
    try:
        # the catalogs are read in less than a second, unless somebody keeps the table from its readers
        with step.db.stop.within(None if seconds is None else max(1.0, seconds), step.db.driver.cancel):
            found = look()
    except TimeUp as error:
        raise OutOfTime(
            f"the {options.max_seconds:g} seconds of --max-seconds were over before {step.target} could be looked at",
            detail="Somebody has locked it, or the server is slow.",
            hint="Run the same command again, or allow more.",
        ) from error
    if seconds is not None:
        wanted = replace(wanted, max_seconds=max(0.0, seconds - (time.monotonic() - began)))
    return found, wanted


@dataclass(frozen=True)
class Verdict:
    """What is made of a proof."""

    table: Table
    proof: Proof
    findings: list[Finding]
    fine: bool
    fail_under: float | None

    def data(self, target: Target) -> dict[str, Any]:
        its, found = self.proof, self.proof.comparison
        return {
            "table": f"{target.schema}.{target.table}",
            "fine": self.fine,
            "stopped": its.stopped,
            "not_looked_at": found.unseen + found.left_out if found else its.rows,
            "comparison": presentation.comparison_data(self.table, found) if found else None,
            "index": presentation.index_data(its.index),
            "search": presentation.quality_data(its.quality) if its.quality else None,
            "not_searched": its.unsearched,
            "fail_under": self.fail_under,
            "findings": presentation.findings_data(self.findings),
        }

    def lines(self, target: Target) -> list[presentation.Line]:
        its = self.proof
        lines: list[presentation.Line] = [
            ("table", str(target)),
            *presentation.compared_lines(self.table, its),
            presentation.index_line(its.index),
        ]
        lines += presentation.quality_lines(its.quality) if its.quality else [("searches", f"none: {its.unsearched}")]
        right = "right" if its.comparison else "nothing to compare"
        verdict = "NOT verified" if its.stopped else right if self.fine else "NOT right"
        return [*lines, *presentation.finding_lines(self.findings), ("verdict", verdict)]


def judge(
    table: Table, extension: Extension, found: Proof, options: argparse.Namespace, findings: list[Finding]
) -> Verdict:
    if found.stopped:
        message = f"the {options.max_seconds:g} seconds of --max-seconds were over before all was looked at"
        findings.append(Finding("error", "max-seconds", message))
    elif not found.looked:
        message = "nothing was looked at: there are no bytes to compare with, and nothing was searched"
        findings.append(Finding("error", "nothing-looked-at", message, f"No searches: {found.unsearched}."))
    if below := _below(found, options.fail_under):
        findings.append(below)
    fine = found.fine and not findings
    findings += advice.advice(found.quality, extension, found.index) if found.quality else []
    return Verdict(table, found, findings, fine, options.fail_under)


def _below(found: Proof, limit: float | None) -> Finding | None:
    """Why --fail-under doesn't hold; in a table without rows there is nothing that could be missed."""
    if limit is None:
        return None
    recall = found.quality.session.all.recall if found.quality else None
    if recall is None:
        if not found.rows and not found.stopped:
            return None
        return Finding("error", "fail-under", f"no recall to hold against --fail-under {limit}", found.unsearched)
    if recall >= limit:
        return None
    return Finding("error", "fail-under", f"the recall of a session is {recall:.3f}, below --fail-under {limit}")
