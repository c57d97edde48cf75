"""What was compared and measured, as lines for people and as data for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ..db.catalog import Index, Table
from ..finding import Finding
from ..sql import quote
from ..verify.equality import MEANING, Comparison, shown
from ..verify.recall import Figures, Quality, Tried
from ..verify.verification import Proof

SHOWN_KEYS = 5
WIDTH = 60  # of the names of ways and groups

Line = tuple[str, object]


def comparison_data(table: Table, found: Comparison) -> dict[str, Any]:
    return {
        "rows": found.rows,
        "equal": found.equal,
        "skipped": dict(found.skipped),
        "without_source": found.without_source,
        "sourceless": found.sourceless,
        "sampled": found.sampled,
        "looked_at_again": found.looked_at_again,
        "wrong": [
            {"kind": kind, "rows": wrong.rows, "keys": [shown(table, key) for key in wrong.keys]}
            for kind, wrong in found.wrong.items()
        ],
    }


def compared_lines(table: Table, proof: Proof) -> Iterable[Line]:
    if proof.comparison:
        return comparison_lines(table, proof.comparison)
    return [("rows", f"{proof.rows:,}; none compared: there are no bytes that the vectors have to be equal to")]


def comparison_lines(table: Table, found: Comparison) -> Iterable[Line]:
    of = f"{found.rows - found.unseen:,} of " if found.unseen else ""
    looked = "looked at, a sample" if found.sampled else "looked at"
    yield "rows", f"{of}{found.rows:,} {looked}; {found.equal:,} equal to the bit"
    for reason, rows in found.skipped.most_common():
        yield "", f"{rows:,} skipped: {reason}"
    if found.without_source:
        yield "", f"{found.without_source:,} without bytes, {found.sourceless:,} of them with a vector"
    if found.looked_at_again:
        yield (
            "",
            f"{found.looked_at_again:,} more were wrong in a first snapshot, and are not in a second one, of all rows",
        )
    if not found.wrong:
        yield "wrong", "none of them" if found.unseen else "none"
    for place, (kind, one) in enumerate(found.wrong.items()):
        keys = ", ".join(shown(table, key) for key in one.keys[:SHOWN_KEYS])
        more = ", …" if one.rows > SHOWN_KEYS else ""
        yield "" if place else "wrong", f"{one.rows:,}: {MEANING[kind]}: {keys}{more}"


def index_data(index: Index | None) -> dict[str, Any] | None:
    if index is None:
        return None
    options = {name: int(value) for name, _, value in (option.partition("=") for option in sorted(index.options))}
    return {
        "name": index.name,
        "method": index.method,
        "opclass": index.opclass,
        "options": options,
        "bytes": index.size,
    }


def index_line(index: Index | None) -> Line:
    if index is None:
        return "index", "none that is valid"
    options = ", ".join(sorted(index.options))
    return "index", f"{quote(index.name)}, {index.method} with {index.opclass}, {options}"


def quality_data(quality: Quality) -> dict[str, Any]:
    best = quality.best
    return {
        "k": quality.k,
        "queries": quality.queries,
        "metric": quality.searched.metric,
        "wanted_recall": quality.wanted,
        "defaults": dict(quality.defaults),
        "planned": tried_data(quality.planned),
        "session": tried_data(quality.session),
        "every_row": tried_data(quality.every_row),
        "tried": [tried_data(one) for one in quality.tried],
        "best": dict(best.way.settings) if best else None,
    }


def tried_data(one: Tried) -> dict[str, Any]:
    return {
        "settings": dict(one.way.settings),
        "by_index": one.by_index,
        **asdict(one.all),
        "groups": {name: asdict(found) for name, found in one.groups.items()},
    }


def quality_lines(quality: Quality) -> Iterable[Line]:
    yield "searches", f"{quality.queries:,} of the table's own rows, for {quality.k} neighbours by {_metric(quality)}"
    yield "", f"{'':<{WIDTH}}{'recall':>8}{'in memory':>11}{'short':>7}{'p50 ms':>9}{'p95 ms':>9}"
    for name, found in searches(quality):
        yield "", _row(name, found)


def searches(quality: Quality) -> Iterable[tuple[str, Figures]]:
    """What was measured, each with its name: by group for what a session meets, then the ways that were tried."""

    def by_group(name: str, one: Tried) -> Iterable[tuple[str, Figures]]:
        yield name, one.all
        for group, found in one.groups.items():
            yield "  " + group, found

    if quality.searched.method:
        yield from by_group("by the index, a session's own settings", quality.session)
    yield from by_group("as the planner has it now", quality.planned)
    for one in quality.tried:
        yield str(one.way), one.all
    yield "every row, without an index", quality.every_row.all


def _metric(quality: Quality) -> str:
    return {"l2": "L2 (<->)", "cosine": "cosine (<=>)", "ip": "inner product (<#>)"}[quality.searched.metric]


def cells(found: Figures) -> tuple[str, str, str, str, str]:
    """Recall, in memory, short, p50 and p95 in milliseconds."""
    recall, in_memory = ("-" if share is None else f"{share:.3f}" for share in (found.recall, found.in_memory))
    return recall, in_memory, f"{found.short:,}", f"{found.p50_ms:.1f}", f"{found.p95_ms:.1f}"


def _row(name: str, found: Figures) -> str:
    recall, in_memory, short, p50, p95 = cells(found)
    return f"{name:<{WIDTH}}{recall:>8}{in_memory:>11}{short:>7}{p50:>9}{p95:>9}"


def finding_lines(findings: Iterable[Finding]) -> Iterable[Line]:
    for place, finding in enumerate(findings):
        for number, line in enumerate(str(finding).splitlines()):
            yield "" if place or number else "advice", line


def findings_data(findings: Iterable[Finding]) -> list[Mapping[str, Any]]:
    return [asdict(finding) for finding in findings]
