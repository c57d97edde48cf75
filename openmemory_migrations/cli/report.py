"""write state, verification and pictures as one HTML file, to attach to a change request; reads only

It proves what verify proves. Exit code 0 when status and verify would end with 0; 1 with what was seen so far when
--max-seconds were over, and 3 when they were before the table could be looked at. Pictures need the extra `report`;
without it their figures are there as tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__, log
from ..db import catalog
from ..db.catalog import Extension
from ..encoding import dimensions
from ..encoding.stored import STORED
from ..errors import UsageError
from ..preflight import state
from ..steps.step import Step
from ..target import Target
from ..verify.norms import Norms
from . import charts, html, output, presentation, running, status, verify
from .status import Judged
from .verify import Verdict

MOST_LENGTHS = 30  # in the picture; the table has them all


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)
    verify.proof_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help="where to write it; default: stdout")


def run(options: argparse.Namespace) -> int:
    """Raises MigrationError."""
    wanted = verify.asking(options)
    _require_writable(options.output)

    def work(step: Step) -> Report | None:
        def look() -> tuple[state.State, Extension | None, str]:
            found = state.look(step)
            with step.db.transaction():
                server = str(step.db.value("SELECT current_setting('server_version')"))
                return found, catalog.extension(step.db), server

        def measure() -> dimensions.Survey:
            with step.db.transaction(snapshot=True):
                return dimensions.survey(step.db)

        (found, extension, server), left = verify.in_time(step, wanted, options, look)
        judged = status.judge(found, step.settings, extension)
        norms, survey, verdict, stopped = Norms(), None, None, None
        try:
            if not found.source_is_vector and not found.cut_over:
                survey, left = verify.in_time(step, left, options, measure)
            if found.ours or found.source_is_vector or found.cut_over:
                verdict = verify.prove(step, left, options, lambda batch: norms.add(batch.values))
        except verify.OutOfTime as error:
            stopped = error.message
        versions = f"openmemory-migrations {__version__}, PostgreSQL {server}"
        versions += f", pgvector {'.'.join(map(str, extension.version))}" if extension else ""
        lengths = {STORED.said(octets): rows for octets, rows in sorted(survey.octets.items())} if survey else {}
        return Report(step.target, versions, found, judged, verdict, lengths, norms, stopped)

    report = running.on_postgres(options, work)
    if report is None:
        verify.require_postgres(options)
        nothing = html.paragraph("There is no Postgres to migrate: OM_METADATA_BACKEND is sqlite.")
        _write(options.output, output.as_json({"fine": True}) if options.json else html.page("Vectors", [nothing]))
        return 0
    if options.json:
        _write(options.output, output.as_json(report.data()))
    else:
        _write(options.output, html.page(f"Vectors of {report.target}", report.parts()))
    return 0 if report.fine else 1


@dataclass(frozen=True)
class Report:
    """`verdict` is None before there is a column to verify; `lengths` are the rows by the length of their bytes.

    What there was no time for is not there, and `stopped` says so.
    """

    target: Target
    versions: str
    state: state.State
    judged: Judged
    verdict: Verdict | None
    lengths: dict[str, int]
    norms: Norms
    stopped: str | None

    @property
    def fine(self) -> bool:
        return self.judged.fine and not self.stopped and (self.verdict is None or self.verdict.fine)

    def data(self) -> dict[str, Any]:
        norms = self.norms
        return {
            "versions": self.versions,
            "fine": self.fine,
            "stopped": self.stopped,
            "status": status.data(self.state, self.judged),
            "verify": self.verdict.data(self.target) if self.verdict else None,
            "lengths": self.lengths,
            "norms": {"rows": norms.rows, "zeros": norms.zeros, "mean": norms.mean, "bins": norms.bins()},
        }

    def parts(self) -> Iterator[str]:
        now = datetime.now(timezone.utc)
        yield html.heading(f"Vectors of {self.target}", 1)
        yield html.paragraph(f"{now:%d %B %Y, %H:%M} UTC. {self.versions}.")
        yield html.verdict(self.fine, "Migrated and right" if self.fine else "Not finished, or not right")
        if self.stopped:
            yield html.paragraph(f"Not all was looked at: {self.stopped}.")
        yield html.heading("State")
        yield html.table(("", ""), status.lines_of(self.state, self.judged))
        plt = charts.pyplot()
        if plt is None:
            yield html.paragraph('For pictures: pip install "openmemory-migrations[report]".')
        if self.verdict:
            yield from self._verification(self.verdict, plt)
        if self.lengths:
            yield html.heading("Dimensions")
            few = dict(sorted(self.lengths.items(), key=lambda one: -one[1])[:MOST_LENGTHS])
            if plt:
                yield html.figure(charts.lengths(plt, few), "Rows by the length of their bytes")
            rows = [(length, f"{number:,}") for length, number in self.lengths.items()]
            yield html.table(("length", "rows"), rows, numbers=1)
        if self.norms.rows:
            yield from self._norms(plt)

    def _verification(self, verdict: Verdict, plt: Any) -> Iterator[str]:
        yield html.heading("Verification")
        yield html.table(("", ""), presentation.compared_lines(verdict.table, verdict.proof))
        yield html.heading("Searches")
        yield from (html.finding(one) for one in verdict.findings)
        quality = verdict.proof.quality
        if quality is None:
            yield html.paragraph(f"None: {verdict.proof.unsearched}.")
            return
        yield html.paragraph(
            f"{quality.queries:,} of the table's own rows, each asked for {quality.k} neighbours as OpenMemory asks,"
            " within their sector. Recall is the share of the true neighbours that came; in memory, of those that"
            " OpenMemory's own search by cosine finds; short, searches that brought fewer rows than there are."
        )
        if plt and quality.tried:
            yield html.figure(charts.recall_against_latency(plt, quality), "Recall against latency")
        head = ("", "recall", "in memory", "short", "p50 ms", "p95 ms")
        rows = [(name, *presentation.cells(found)) for name, found in presentation.searches(quality)]
        yield html.table(head, rows, numbers=5)

    def _norms(self, plt: Any) -> Iterator[str]:
        norms = self.norms
        yield html.heading("Lengths of the vectors")
        yield html.paragraph(
            f"{norms.rows:,} vectors from {norms.least:.6g} to {norms.most:.6g} long, {norms.mean:.6g} in the mean;"
            f" {norms.zeros:,} of them are zeros. L2 and cosine put vectors of one length in the same order."
        )
        if plt and norms.bins():
            yield html.figure(charts.norms(plt, norms), "Rows by the length of their vector")


def _require_writable(file: str | None) -> None:
    if file is None:
        return
    path = Path(file).resolve()
    place = path if path.exists() and not path.is_file() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f'--output "{file}" can\'t be written', hint="Name a file in a folder that is there.")


def _write(file: str | None, text: str) -> None:
    if file is None:
        # the page says that it is UTF-8, whatever the terminal's encoding
        sys.stdout.buffer.write(text.encode())
        sys.stdout.flush()
        return
    path = Path(file).resolve()  # the file that a link leads to
    unfinished = path
    try:
        if path.is_file() or not path.exists():
            # beside it first: whoever opens the file meanwhile sees the old one or the new one
            unfinished = Path(f"{path}.{os.getpid()}.tmp")
        unfinished.write_text(text, encoding="utf-8")
        if unfinished != path:
            unfinished.replace(path)
    except OSError as error:
        if unfinished != path:
            with suppress(OSError):
                unfinished.unlink()
        raise UsageError(f'--output "{file}" can\'t be written: {error.strerror}') from error
    log.notice(f'report written to "{file}"')
