"""Whether a database can be migrated and what it will take: all that can be found out without changing anything.

Each part is looked at in short transactions of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from ..backfill import engines, pace
from ..columns.cutover_mark import Mark
from ..cutover import gate
from ..db import catalog, citus, locks, partitions, replication
from ..db.catalog import Extension, Table
from ..db.keys import SHOWN_KEYS
from ..encoding import dimensions
from ..encoding.stored import STORED
from ..errors import MigrationError
from ..finding import Finding
from ..index import build, choice
from ..index.choice import HALF_MOST, INDEX_DIMENSIONS, NoIndex, Plan
from ..sql import SQL, quote
from ..steps import expand, interference, native_table, repair, requirements
from ..steps.step import Step
from . import activity, disk, known_faults, refusals, state, trial
from .results import Facts, part
from .rows import Lengths, Look, held

SEVERITIES = ("error", "warning", "notice")


def examine(step: Step, sample: int | None) -> Facts:
    facts = Facts()
    part(step, facts, "server", lambda: _server(step, facts))
    part(step, facts, "table", lambda: _table(step, facts))
    part(step, facts, "traffic", lambda: facts.findings.extend(activity.in_the_way(step, facts.table)))
    table = facts.table
    if table is not None and not facts.has("table", "already-vector", "cut-over"):
        part(step, facts, "rows", lambda: _rows(step, facts, table, sample), rows=True)
        part(step, facts, "not-valid", lambda: _held(step, facts, table), rows=True)
        part(step, facts, "index", lambda: _cost(step, facts, table))
        part(step, facts, "index", lambda: _halves(step, facts, table), rows=True)
        part(step, facts, "index", lambda: _name(step, facts, table))
        part(step, facts, "trial", lambda: _trial(step, facts, table), rows=True)
    if table is not None and not facts.has("table", "cut-over"):
        part(step, facts, "update", lambda: _updates(step, facts, table), rows=True)
    facts.findings.sort(key=lambda one: SEVERITIES.index(one.severity))
    return facts


def _server(step: Step, facts: Facts) -> None:
    db, settings = step.db, step.settings
    facts.server = catalog.server_version(db)
    facts.extension = catalog.extension(db)
    facts.installed = facts.extension is not None
    blocks = (requirements.BLOCKS.server, requirements.BLOCKS.extension, requirements.BLOCKS.extension_creation)
    for block in blocks:
        facts.findings += requirements.unmet(step, block)
    if facts.extension is None and (available := catalog.available_version(db)):
        facts.extension = Extension(expand.home(db), catalog.version(available))
    facts.findings += known_faults.faults(facts.server, facts.extension.version if facts.extension else None, settings)
    facts.connections = activity.connections(db, settings)
    facts.findings += activity.too_few(facts.connections)
    facts.findings += activity.through_pooler(db)
    if not facts.has("standby"):
        facts.replication = replication.replication(db)
        facts.findings += replication.of_the_server(db, facts.replication, settings)
    requirements.require_server(db)


def _table(step: Step, facts: Facts) -> None:
    if facts.has("server"):
        return
    db, target, settings = step.db, step.target, step.settings
    facts.revisions = state.revisions(db, settings)
    if catalog.schema_exists(db, target.schema):
        facts.findings += refusals.of_the_version_table(step)
    facts.findings += requirements.unmet(step, requirements.BLOCKS.table)
    table = catalog.table(db, target.schema, target.table)
    # of a table that can't be migrated the rest is told as well
    if table is None or table.kind not in "rp":
        return
    facts.table = table
    if mark := Mark.of(table, target):
        facts.findings.append(Finding("notice", "cut-over", f"{mark.said(target)}; nothing to migrate"))
        return
    source = table.columns.get(target.source)
    if source is not None and source.is_vector:
        facts.findings += _newer(step, facts, table)
        return
    column = table.columns.get(target.vector)
    facts.ours = column is not None and column.ours
    facts.leaves = len(partitions.leaves(db, table.oid))
    facts.findings += refusals.of_the_table(step.with_table(table), facts.revisions)
    facts.findings += repair.faults(step.with_table(table))
    if facts.ours:
        facts.findings += gate.of_drop(step.with_table(table))
    schema = facts.extension.schema if facts.extension else "public"
    type_name = expand.vector_type(Extension(schema, ()), settings.dimensions)
    facts.findings += replication.of_the_table(step.with_table(table), type_name)


def _newer(step: Step, facts: Facts, table: Table) -> Iterator[Finding]:
    """What an upgrade would do to a `v` that holds vectors itself, and what it would refuse."""
    target, settings = step.target, step.settings
    found, problems = native_table.examine(step.with_table(table))
    for code, problem in problems:
        yield Finding.of(code, problem)
    has = found.source.dimensions
    column = f"column {quote(target.source)} of {target} is of type vector{f'({has})' if has else ''} already"
    if has:
        column += ", nothing to convert; an upgrade sees to its index"
    elif found.size:
        how = "as the table is empty" if found.empty else "by a column beside it that takes its place"
        column += f": an upgrade gives it {found.size:,} dimensions, {how}, and an index"
    yield Finding("notice", "already-vector", column)
    if found.size is None and not problems:
        message, hint = native_table.no_dimensions(target)
        yield Finding("warning", "no-dimensions", message, hint=hint)
    if found.pending and not found.empty:
        if slots := pace.slots_in_the_way(step.db, settings):
            yield Finding.of("slot-lag", slots)
        beside = replace(target, vector=target.typed)
        type_name = expand.vector_type(found.ctx.extension, found.pending)
        yield from replication.of_the_table(step.of(beside).with_table(table), type_name)
    facts.dimensions = has
    facts.leaves = len(partitions.leaves(step.db, table.oid))
    rows = step.db.value("SELECT count(*) FROM {table} WHERE {source} IS NOT NULL") // (facts.leaves or 1)
    facts.memory_kb = build.most_memory(step.db, settings)
    facts.index = choice.plan(target.native, settings.native, found.ctx.extension, found.size, rows, facts.memory_kb)
    yield from _scarce(facts)
    if isinstance(facts.index, Plan):
        yield from build.name_taken(found.ctx.native, table.oid)


def _updates(step: Step, facts: Facts, table: Table) -> None:
    """Not in a transaction that is read-only: one UPDATE is tried, of no row."""
    native = facts.has("already-vector")
    if not facts.has("standby", "read-only", "locked") and not (native and facts.dimensions):
        with step.db.transaction():
            locks.set_timeout(step.db, f"{step.settings.lock_timeout_ms}ms")
            found = list(interference.of_updates(step.with_table(table), step.settings.lock_timeout_ms))
        facts.findings += [Finding.of(code, problem) for code, problem in found]
        if not found and step.target.vector not in table.columns:
            _whole_rows(step, facts, table, native=native)


def _whole_rows(step: Step, facts: Facts, table: Table, *, native: bool) -> None:
    """Whether others' triggers bear a column more; where that can't be tried, the step says it."""
    type_name = quote(facts.extension.schema, "vector") if facts.installed and facts.extension else SQL("float8[]")
    column = step.target.typed if native else step.target.vector
    with step.db.transaction():
        locks.set_timeout(step.db, f"{step.settings.lock_timeout_ms}ms")
        found = interference.of_whole_rows(step.with_table(table), added=(column, type_name))
    facts.findings += [Finding.of("whole-row", problem) for problem in found]


def _rows(step: Step, facts: Facts, table: Table, sample: int | None) -> None:
    db, target, settings = step.db, step.target, step.settings
    look = Look.at(step.with_table(table), sample)
    facts.sizes = look.sizes()
    facts.lengths = lengths = look.lengths(facts.sizes)
    column = table.columns.get(target.vector)
    try:
        if facts.ours and column is not None:
            facts.dimensions, facts.origin = column.dimensions, "as the column has them"
        else:
            adopted: Counter[int] = Counter()
            if column is not None and column.is_vector and facts.extension is not None:
                adopted = look.sourceless(lengths, db.names["vector"], **facts.extension.names())
            facts.dimensions = dimensions.resolve(settings.dimensions, dimensions.Survey(lengths.all, adopted))
            facts.origin = "as configured" if settings.dimensions else "as the rows have them"
        if facts.dimensions is None:
            facts.findings.append(
                Finding("warning", "no-dimensions", expand.no_dimensions(target), hint=f"{expand.FOR_AN_INDEX}.")
            )
    except MigrationError as error:
        facts.findings.append(Finding.of("dimensions", error))
    facts.bad = look.bad(lengths, facts.dimensions)
    facts.findings += _unfit(step, facts, lengths)


def _unfit(step: Step, facts: Facts, lengths: Lengths) -> Iterator[Finding]:
    looked_at = "" if lengths.share == 1 else f" of {lengths.looked_at:,} looked at"
    source = quote(step.target.source)
    fails = step.settings.on_bad_rows == "fail"
    if skipped := facts.bad.reasons.total():
        yield Finding(
            "error" if fails else "warning",
            "bad-rows",
            f"{skipped:,} rows{looked_at} of {step.target} can't be converted"
            + (", and OM_ON_BAD_ROWS is fail" if fails else " and would be skipped"),
            f"{facts.bad.summary()}.",
            f"Mend {source} in those rows, before or after; nothing waits for it."
            if not fails
            else f"Mend {source} in those rows, or set OM_ON_BAD_ROWS=skip.",
        )
    if unreadable := facts.bad.unreadable:
        passed_by = _passed_by(step)
        yield Finding(
            "warning" if passed_by else "error",
            "unreadable-rows",
            f"{len(unreadable):,} rows{looked_at} of {step.target} can't be read: their {source} is damaged",
            f"Such as {', '.join(unreadable[:SHOWN_KEYS])}.",
            "Restore them from a backup or delete them"
            + ("." if passed_by else ", or pass them by with OM_ON_BAD_ROWS=skip."),
        )
    if lengths.dim_differs:
        yield Finding(
            "notice",
            "dim-differs",
            f"column dim disagrees with the bytes in {lengths.dim_differs:,} rows{looked_at} of {step.target}",
            "The bytes decide.",
        )


def _held(step: Step, facts: Facts, table: Table) -> None:
    """Rows that no UPDATE can give a vector, by a constraint that was added NOT VALID."""
    if not facts.convertible or facts.dimensions is None:
        return
    unconverted = (STORED.pending if facts.ours else STORED.of)(facts.dimensions)
    passed_by = _passed_by(step)
    for on, name, rows in held(step.with_table(table), unconverted):
        shown = f"ALTER TABLE {on.sql_name} VALIDATE CONSTRAINT {quote(name)};"
        facts.findings.append(
            Finding(
                "warning" if passed_by else "error",
                "not-valid",
                f"{rows:,} rows of {on} violate constraint {quote(name)}, which is NOT VALID"
                if rows
                else f"constraint {quote(name)} of {on}, which is NOT VALID, fails for a row",
                "No UPDATE can give them a vector." if rows else "No UPDATE can give that a vector.",
                f"Mend those rows, then: {shown}" + ("" if passed_by else " Or pass them by with OM_ON_BAD_ROWS=skip."),
            )
        )


def _passed_by(step: Step) -> bool:
    """Whether rows that can't be converted, though their bytes are vectors, fail nothing."""
    return step.settings.on_bad_rows != "fail" and "on_bad_rows" in step.settings.given


def _cost(step: Step, facts: Facts, table: Table) -> None:
    db, target, settings, lengths = step.db, step.target, step.settings, facts.lengths
    if lengths is None or facts.has("engine", "dimensions") or (facts.ours and not facts.convertible):
        return
    if facts.convertible and (problem := pace.slots_in_the_way(db, settings)):
        facts.findings.append(Finding.of("slot-lag", problem))
    facts.shards = citus.shards(db, table.oid)
    facts.engine = engines.choose(step.with_table(table), facts.extension if facts.installed else None)
    if facts.dimensions:
        facts.growth = disk.growth(facts.dimensions, facts.convertible)
    if facts.extension is None:
        return
    # an index for each partition, or for each shard
    each = facts.shards or facts.leaves or 1
    rows = lengths.whole(lengths.all.total() - facts.bad.reasons.total()) // each
    facts.memory_kb = build.most_memory(db, settings)
    facts.index = wanted = choice.plan(target, settings, facts.extension, facts.dimensions, rows, facts.memory_kb)
    if isinstance(wanted, Plan):
        facts.index = replace(wanted, size=each * wanted.size)
    facts.findings += _scarce(facts)


def _halves(step: Step, facts: Facts, table: Table) -> None:
    """Whether there are rows that an index on the cast to halfvec can't hold."""
    lengths, size = facts.lengths, facts.dimensions
    if not isinstance(facts.index, Plan) or not facts.index.half or lengths is None or size is None:
        return
    rows, keys = Look.at(step.with_table(table), None).overflows_half(lengths, size)
    detail = f"Where there is such an index, a write of a value beyond ±{HALF_MOST:,} fails."
    if not rows:
        facts.findings.append(Finding("notice", "halfvec", "the index is on the cast to halfvec", detail))
        return
    facts.index = NoIndex(f"{rows:,} rows hold values beyond ±{HALF_MOST:,}, which halfvec can't hold")
    facts.findings.append(
        Finding(
            "warning",
            "no-index",
            f"no index: {facts.index.reason}",
            f"Such as {', '.join(keys[:SHOWN_KEYS])}. {detail}",
            f"Mend those rows. Up to {INDEX_DIMENSIONS:,} dimensions OM_INDEX_HALFVEC=off does without the cast.",
        )
    )


def _name(step: Step, facts: Facts, table: Table) -> None:
    """Whether something else has the name of the index; what is on an adopted column goes with that."""
    none = step.settings.index == "none" or facts.dimensions is None or isinstance(facts.index, NoIndex)
    if not none and step.target.adopted not in table.columns:
        facts.findings += build.name_taken(step, table.oid)


def _scarce(facts: Facts) -> Iterator[Finding]:
    if isinstance(facts.index, NoIndex) and facts.index.wanted and not facts.has("no-dimensions"):
        yield Finding("warning", "no-index", f"no index: {facts.index.reason}", hint=facts.index.hint)
    if isinstance(facts.index, Plan) and (found := choice.scarce(facts.index, facts.memory_kb)):
        yield Finding("notice", "index-memory", found[0], hint=found[1])


def _trial(step: Step, facts: Facts, table: Table) -> None:
    if facts.lengths is None:
        return
    if not facts.convertible:
        facts.untold = "there is nothing to convert"
    elif facts.dimensions is None:
        facts.untold = "the dimensions are not known"
    elif not facts.installed or facts.extension is None:
        facts.untold = 'extension "vector" is not installed yet'
    elif facts.shards:
        facts.untold = "the table is distributed by Citus"
    elif facts.errors or facts.engine is None:
        facts.untold = "first the errors below"
    else:
        facts.untold = "the attempt failed"
        facts.trial = trial.run(
            step.with_table(table).with_extension(facts.extension),
            facts.dimensions,
            facts.engine.name,
        )
