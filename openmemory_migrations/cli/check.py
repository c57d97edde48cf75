"""say whether the database can be migrated, and what it will take; changes nothing

Findings are printed in PostgreSQL's manner, each with the line that mends it: an error keeps the database from being
migrated, a warning is a trap, a notice good to know. Exit code 0 when it can be migrated, also where rows would be
skipped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from ..encoding.stored import STORED
from ..hosts import project
from ..index.choice import NoIndex, Plan
from ..log import amount, duration
from ..preflight import examination
from ..preflight.results import Facts
from ..preflight.rows import Lengths
from ..preflight.trial import SLOWER
from ..settings import Settings
from ..sql import quote
from ..steps.step import Step
from ..target import Target
from . import output, running

MOST_LENGTHS = 8  # of the histogram, on lines for people


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)
    parser.add_argument(
        "--sample", type=_sample, metavar="N", help="look at about N rows for lengths and bad rows; default: at all"
    )


def _sample(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of rows')
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Raises MigrationError where there is no database to look at."""

    def work(step: Step) -> Facts:
        return examination.examine(step, options.sample)

    facts = running.on_postgres(options, work)
    if facts is None:
        return output.nothing(options)
    settings, target = running.configured(options)
    output.write(options, _data(facts, target, settings), _lines(facts, target, settings))
    if not options.json:
        for one in facts.findings:
            print(one)
        print(f"verdict: {verdict(facts)}")
        sys.stdout.flush()
    return 1 if facts.errors else 0


def verdict(facts: Facts) -> str:
    if facts.errors:
        return f"can't be migrated: {facts.errors:,} error{'s' if facts.errors > 1 else ''}"
    if facts.has("cut-over"):
        return "nothing to migrate"
    if facts.has("already-vector"):
        return "nothing to migrate" if facts.dimensions else "can be migrated"
    if facts.ours:
        # a host's chain has its version table where only the host knows
        whole = facts.revisions in (None, [project.FINALIZE])
        pending = f", {facts.convertible:,} rows are pending" if facts.convertible else ""
        return ("migrated already" if whole else "begun, and can be continued") + pending
    return "can be migrated"


def seconds(facts: Facts, settings: Settings) -> tuple[float, float] | None:
    """Least and most of a backfill by one worker, with the rests that the settings ask for."""
    if facts.trial is None or not facts.trial.rows:
        return None
    rests = facts.convertible / settings.backfill_batch * settings.backfill_pause_ms / 1000
    work = facts.convertible / facts.trial.rows_per_s
    return work + rests, SLOWER * work + rests


def _lines(facts: Facts, target: Target, settings: Settings) -> list[tuple[str, object]]:
    table, found = facts.table, facts.extension
    lines: list[tuple[str, object]] = [("server", f"PostgreSQL {_version(facts.server)}")]
    if found:
        where = f"{'in' if facts.installed else 'available, would be created in'} schema {quote(found.schema)}"
        lines.append(("pgvector", f"{_dotted(found.version)}, {where}"))
    else:
        lines.append(("pgvector", "not available"))
    if table is None:
        lines.append(("table", f"{target}: see the errors below"))
    else:
        parts = f", {facts.leaves:,} partitions" if table.kind == "p" else ""
        key = f"primary key {', '.join(map(quote, table.key))}" if table.key else "no primary key"
        lines += [
            ("table", f"{target}{parts}, {key}"),
            ("revision", ", ".join(facts.revisions) if facts.revisions else "none"),
        ]
    if facts.lengths:
        lines += _rows(facts, facts.lengths)
    if facts.sizes:
        size = facts.sizes
        parts = f"{amount(size.table)}, out of line {amount(size.toast)}, indexes {amount(size.indexes)}"
        lines.append(("size", parts))
    if facts.growth:
        lines.append(("grows by", f"about {amount(facts.growth.table)}, and WAL of about {amount(facts.growth.wal)}"))
    if isinstance(facts.index, Plan):
        lines += _index(facts, facts.index)
    elif facts.index:
        lines.append(("index", f"none: {facts.index.reason}"))
    if facts.engine:
        lines.append(("engine", facts.engine))
    if facts.lengths:
        lines.append(("time", _time(facts, settings)))
    if facts.connections:
        lines.append(
            ("connections", f"{facts.connections.free:,} free, a run needs up to {facts.connections.needed:,}")
        )
    if facts.replication:
        lines.append(("replicas", f"{facts.replication.replicas:,}"))
    return lines


def _rows(facts: Facts, lengths: Lengths) -> list[tuple[str, object]]:
    sampled = lengths.share < 1
    about = "about " if sampled else ""
    looked_at = f", {lengths.looked_at:,} of them looked at" if sampled else ""
    of_those = " of those" if sampled else ""
    lines: list[tuple[str, object]] = [
        ("rows", f"{about}{lengths.total:,}{looked_at}; {about}{facts.convertible:,} to convert")
    ]
    if lengths.without_source:
        lines.append(("", f"{lengths.without_source:,} without v"))
    skipped = facts.bad.reasons.most_common()
    lines += [("", f"{rows:,}{of_those} would be skipped: {reason}") for reason, rows in skipped]
    size = "not known" if facts.dimensions is None else f"{facts.dimensions:,}, {facts.origin}"
    lines.append(("dimensions", size))
    lines += [("", f"{STORED.said(octets)}: {rows:,}") for octets, rows in lengths.all.most_common(MOST_LENGTHS)]
    if (others := len(lengths.all) - MOST_LENGTHS) > 0:
        lines.append(("", f"and {others:,} other lengths"))
    return lines


def _index(facts: Facts, wanted: Plan) -> list[tuple[str, object]]:
    what = f"{wanted.method} with {wanted.opclass}, {wanted.options}: about {amount(wanted.size)}"
    each = f", on each of {facts.leaves:,} partitions" if facts.leaves > 1 else ""
    needs, gets = amount(1024 * wanted.memory_kb), amount(1024 * facts.memory_kb)
    return [("index", what + each), ("", f"its build needs about {needs} of memory and gets up to {gets}")]


def _time(facts: Facts, settings: Settings) -> str:
    taken = seconds(facts, settings)
    if taken is None or facts.trial is None:
        return f"can't be told: {facts.untold}"
    least, most = (duration(max(1, one)) for one in taken)
    return (
        (least if least == most else f"{least} to {most}")
        + f", an estimate: {facts.trial.rows:,} rows took a temporary table, which needs no WAL,"
        f" {facts.trial.rows / facts.trial.rows_per_s:.1f} s; without the index"
    )


def _data(facts: Facts, target: Target, settings: Settings) -> dict[str, Any]:
    table, lengths, found = facts.table, facts.lengths, facts.extension
    return {
        "table": f"{target.schema}.{target.table}",
        "migratable": not facts.errors,
        "verdict": verdict(facts),
        "findings": [asdict(one) for one in facts.findings],
        "server": {"version": _version(facts.server), "number": facts.server},
        "pgvector": found and {"version": _dotted(found.version), "schema": found.schema, "installed": facts.installed},
        "revisions": facts.revisions,
        "partitions": facts.leaves if table and table.kind == "p" else 0,
        "primary_key": list(table.key) if table else [],
        "columns": {column.name: column.type_shown for column in table.columns.values()} if table else {},
        "rows": lengths and _row_data(facts, lengths),
        "dimensions": lengths
        and {
            "value": facts.dimensions,
            "origin": facts.origin,
            "histogram": [{"bytes": octets, "rows": rows} for octets, rows in sorted(lengths.all.items())],
        },
        "bytes": facts.sizes and asdict(facts.sizes),
        "growth": facts.growth and asdict(facts.growth),
        "index": _index_data(facts),
        "engine": facts.engine and facts.engine.name,
        "estimate": _estimate(facts, settings),
        "connections": facts.connections and asdict(facts.connections),
        "replication": facts.replication and asdict(facts.replication),
    }


def _row_data(facts: Facts, lengths: Lengths) -> dict[str, Any]:
    return {
        "total": lengths.total,
        "looked_at": lengths.looked_at,
        "sampled": lengths.share < 1,
        "pending": lengths.whole(lengths.pending.total()),
        "convertible": facts.convertible,
        "without_source": lengths.without_source,
        "skipped": [
            {"reason": reason, "rows": rows, "keys": facts.bad.keys.get(reason, [])}
            for reason, rows in facts.bad.reasons.most_common()
        ],
        "dim_differs": lengths.dim_differs,
    }


def _index_data(facts: Facts) -> dict[str, Any] | None:
    wanted = facts.index
    if wanted is None:
        return None
    if isinstance(wanted, NoIndex):
        return {"method": None, "reason": wanted.reason}
    return {
        "method": wanted.method,
        "opclass": wanted.opclass,
        "options": wanted.options,
        "bytes": wanted.size,
        "needs_kb": wanted.memory_kb,
        "gets_kb": facts.memory_kb,
    }


def _estimate(facts: Facts, settings: Settings) -> dict[str, Any]:
    if facts.trial is None:
        return {"seconds": None, "reason": facts.untold}
    return {
        "seconds": dict(zip(("least", "most"), taken, strict=True)) if (taken := seconds(facts, settings)) else None,
        "rows_per_second": facts.trial.rows_per_s,
        "tried_rows": facts.trial.rows,
    }


def _version(number: int) -> str:
    return f"{number // 10_000}.{number % 10_000}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
