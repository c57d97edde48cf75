"""say where the migration stands, and what to do next; also while a run is going on

Exit code 0 when the chain is at its head, nothing is pending, the trigger is on, the index valid, unless
OM_SYNC_TRIGGER or OM_INDEX say that there is to be none, and nothing is half done.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from typing import Any

from ..columns.cutover_mark import DO, UNDO
from ..db.catalog import Extension, extension
from ..environment import only_stamps
from ..errors import ANEW, INDEX_ANEW
from ..hosts import project
from ..index.choice import NoIndex, Plan, plan
from ..preflight import state
from ..preflight.state import CutOver, State
from ..settings import Settings
from ..sql import quote
from ..steps.step import Step
from ..target import Target
from . import output, running


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Raises MigrationError."""

    def work(step: Step) -> tuple[State, Extension | None]:
        found = state.look(step)
        with step.db.transaction():
            return found, extension(step.db)

    result = running.on_postgres(options, work)
    if result is None:
        return output.nothing(options)
    found, installed = result
    settings, _ = running.configured(options)
    judged = judge(found, settings, installed)
    output.write(options, data(found, judged), lines_of(found, judged))
    return 0 if judged.fine else 1


@dataclass(frozen=True)
class Judged:
    """What is made of a state: whether it is as it should be in the end, and the next thing to do."""

    at_head: bool
    index: str
    fine: bool
    next: str
    left: list[str] = field(default_factory=list)  # by a run that was interrupted


def judge(found: State, settings: Settings, installed: Extension | None) -> Judged:
    if found.cut_over:
        return _judge_cut_over(found, found.cut_over, settings, installed)
    there = found.ours
    if found.source_is_vector:
        there, settings = found.dimensions is not None, settings.native
    # a host's chain has its version table where only the host knows
    at_head = found.revisions == [project.FINALIZE] or (found.revisions is None and there)
    index, wanted, remark = _index(found, settings, installed)
    pending = found.rows.pending if found.rows else 0
    half_undone = bool(found.cutover_revisions) and not found.source_is_vector
    left = found.left_by_cutover + ([] if found.runs else [f"index {quote(one.name)}" for one in found.left])
    if not there or not at_head:
        # stamped without its column: by a downgrade that was killed before its stamp, which the same one ends
        gone = at_head or (found.revisions and not there and not found.source_is_vector)
        todo = ANEW if gone else "openmemory-migrations upgrade"
        if found.source_is_vector and not (there or found.to_be):
            todo = f"set OM_VEC_DIM or OM_TIER; {todo}"
    elif half_undone:
        todo = f"{UNDO}, which was interrupted before its stamp"
    elif pending:
        todo = "openmemory-migrations backfill"
    elif found.aside:
        todo = ANEW if found.revisions else "alembic upgrade head, or openmemory-migrations upgrade"
        todo += f": {quote(found.target.adopted)} may have values without source, which that carries over"
    elif found.faults:
        todo = f"{found.faults[0].message}: {(found.faults[0].hint or '').rstrip('.')}"
    elif found.left_by_cutover:
        todo = f"{DO} goes on with the cutover that was interrupted; {UNDO} takes away what it has left"
    elif wanted:
        todo = wanted
    elif left:
        todo = f"{INDEX_ANEW} clears up {found.left[0].name}, which an interrupted run has left"
    else:
        todo = f"nothing; {INDEX_ANEW} {remark}" if remark else "nothing"
    if found.runs:
        todo = "wait for what is running; " + todo
    open_ends = pending or wanted or left or half_undone or found.aside or found.faults
    return Judged(at_head, index, bool(at_head and there and not open_ends), todo, left)


def _judge_cut_over(found: State, cut_over: CutOver, settings: Settings, installed: Extension | None) -> Judged:
    target = found.target
    if cut_over.mode == "swap":
        target, settings = target.native, settings.native
    assert installed is not None  # there is a column of its type
    wanted = plan(target, settings, installed, found.dimensions, cut_over.vectors)
    if cut_over.index:
        index = f"{quote(cut_over.index.name)}, valid"
    else:
        index = "none that searches can use" + ("" if isinstance(wanted, Plan) else f": {wanted.reason}")
    missing = not cut_over.index and _todo_without(wanted)
    todo = []
    if found.cutover_revisions == []:  # without a version table it is a host's
        todo.append(only_stamps(cut_over.mode))
    if cut_over.changed:
        todo.append(f"{cut_over.changed.message}: {(cut_over.changed.hint or '').rstrip('.')}")
    if cut_over.undoing:
        todo.append(f"{UNDO}, which was interrupted")
    elif missing:
        todo.append(missing)
    waiting = "wait for what is running; " if found.runs else ""
    return Judged(True, index, not todo, waiting + ("; then ".join(todo) or "nothing"))


def _todo_without(wanted: Plan | NoIndex) -> str | None:
    """What to do about an index that is wanted and isn't there."""
    if isinstance(wanted, Plan):
        return INDEX_ANEW
    if not wanted.wanted:
        return None
    return f"an index is wanted that can't be had, as {wanted.reason}. {wanted.hint or ''}".strip().rstrip(".")


def _index(found: State, settings: Settings, installed: Extension | None) -> tuple[str, str | None, str]:
    """What to say of the index, what to do where a wanted one isn't there, and what could be done where it is."""
    rows = found.rows.converted if found.rows else 0
    wanted = (
        plan(found.target, settings, installed, found.dimensions, rows)
        if installed
        else NoIndex("there is no extension yet", wanted=False)
    )
    index = found.index
    if found.build and not (index and index.valid):
        return f"being built: {found.build}", INDEX_ANEW, ""
    if index is None:
        text = "missing" if isinstance(wanted, Plan) else f"none: {wanted.reason}"
        return text, _todo_without(wanted), ""
    size = f"{index.size / 1024**2:,.1f} MiB"
    text = f"{quote(index.name)}, {index.method} with {index.opclass}, {size}"
    if not index.valid:
        return text + ", INVALID", _todo_without(wanted), ""
    if found.build:
        return f"{text}, valid; another is being built: {found.build}", None, ""
    if settings.index == "none":
        return text + ", valid, but OM_INDEX is none", None, "drops it"
    if isinstance(wanted, Plan) and not wanted.matches(index):
        return text + ", valid, but not as the settings want it", None, f"makes it {wanted.method} ({wanted.options})"
    return text + ", valid", None, ""


def data(found: State, judged: Judged) -> dict[str, Any]:
    rows = asdict(found.rows) if found.rows else None
    return {
        "table": f"{found.target.schema}.{found.target.table}",
        "fine": judged.fine,
        "revisions": found.revisions,
        "at_head": judged.at_head,
        "column": {
            "name": found.target.vector,
            "type": found.column,
            "dimensions": found.dimensions,
            "ours": found.ours,
        },
        "rows": rows,
        "cut_over": None
        if found.cut_over is None
        else {
            "mode": found.cut_over.mode,
            "undoing": found.cut_over.undoing,
            "rows": found.cut_over.rows,
            "vectors": found.cut_over.vectors,
            "vectors_without_bytes": found.cut_over.without_bytes,
            "kept": found.cut_over.kept,
        },
        "trigger": found.trigger,
        "faults": [fault.message for fault in found.faults],
        "indexes": [
            {"name": i.name, "method": i.method, "opclass": i.opclass, "valid": i.valid, "bytes": i.size}
            for i in found.indexes
        ],
        "index_build": found.build,
        "left": judged.left,
        "runs": [{"pid": pid, "application_name": name, "since": since} for pid, name, since in found.runs],
        "found_by_application": found.found_by_application,
        "detection": found.target.detection,
        "next": judged.next,
    }


def lines_of(found: State, judged: Judged) -> list[tuple[str, object]]:
    target, rows, cut_over = found.target, found.rows, found.cut_over
    stamped = "not stamped" if found.revisions == [] else ", ".join(found.revisions or [])
    lines: list[tuple[str, object]] = [
        ("table", str(target)),
        ("revision", stamped or "no version table of this package's own (not begun, or a host's chain)"),
        ("column", f"{quote(target.vector)} {found.column}({found.dimensions or ''})" if found.column else "missing"),
    ]
    if cut_over:
        return [
            *lines[:2],
            ("cutover", cut_over.said),
            ("vectors", f"{cut_over.vectors:,} in {cut_over.rows:,} rows; {cut_over.without_bytes:,} without bytes"),
            *([("kept", _kept(target, cut_over))] if cut_over.kept != 0 else []),
            ("index", judged.index),
            *_running(found),
            ("next", judged.next),
        ]
    if rows:
        share = 100 * rows.converted // (rows.total or 1)
        lines += [
            ("rows", f"{rows.total:,}; {rows.converted:,} converted ({share} %), {rows.pending:,} pending"),
            *(("", f"{number:,} skipped: {reason}") for reason, number in rows.skipped.items()),
        ]
    if not found.source_is_vector or not found.dimensions:
        lines.append(("trigger", "on" if found.trigger else "off"))
        lines += [("", fault.message) for fault in found.faults]
    lines.append(("index", judged.index))
    if judged.left:
        lines.append(("left", f"by a run that was interrupted: {'; '.join(judged.left)}"))
    if found.guards and not found.runs:
        lines.append(("left", f"trigger {', '.join(found.guards)}, without any effect; the next run drops it"))
    lines += _running(found)
    if found.source_is_vector:
        return [*lines, ("next", judged.next)]
    lines += [
        ("application", "finds the column" if found.found_by_application else "OpenMemory 1.x won't find the column"),
        ("", f"it should ask: {target.detection}"),
        ("next", judged.next),
    ]
    return lines


def _kept(target: Target, cut_over: CutOver) -> str:
    rows = "rows that this role may not read" if cut_over.kept is None else f"{cut_over.kept:,} rows"
    return f"{rows} that no vector can hold, in {quote(target.kept)}"


def _running(found: State) -> list[tuple[str, object]]:
    return [("running", f'process {pid} "{name}", since {since}') for pid, name, since in found.runs]
