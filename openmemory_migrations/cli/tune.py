"""try candidate indexes on a sampled copy of the table, and say which to build and how to search it

The copy is a temporary table, gone with the session; nothing else is written. Exit code 0 when a candidate reaches the
wanted recall, 1 when none does.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..settings import Settings
from ..steps.step import Step
from ..verify import tuning
from ..verify.recall import Figures
from ..verify.tuning import Candidate, Tuning
from . import output, presentation, running, verify

WIDTH = 50


def arguments(parser: argparse.ArgumentParser) -> None:
    running.arguments(parser)
    output.arguments(parser)
    verify.search_arguments(parser)
    parser.add_argument("--sample", type=int, default=20_000, metavar="N", help="rows to copy; default: 20,000")


def run(options: argparse.Namespace) -> int:
    """Raises MigrationError."""
    asking = verify.asking(options)
    verify.require_queries(options)

    def work(step: Step) -> Tuning:
        return tuning.tune(step.searched(), asking)

    found = running.on_postgres(options, work)
    if found is None:
        return output.nothing(options)
    best = found.best
    data = {
        "fine": best is not None,
        "rows": found.rows,
        "of": found.of,
        "k": found.k,
        "wanted_recall": found.wanted,
        "candidates": [_data(found, number) for number in range(len(found.candidates))],
        "every_row": presentation.tried_data(found.every_row),
        "best": _best_data(found, best) if best else None,
    }
    output.write(options, data, _lines(found))
    return 0 if best else 1


def _data(found: Tuning, number: int) -> dict[str, Any]:
    one = found.candidates[number]
    return {
        "method": one.plan.method,
        "options": one.plan.options,
        "halfvec": one.half,
        "build_seconds": one.seconds,
        "bytes": one.bytes,
        "on_frontier": number in found.frontier(),
        "tried": [presentation.tried_data(way) for way in one.tried],
    }


def _best_data(found: Tuning, best: Candidate) -> dict[str, Any]:
    return {"settings": _settings(found, best), "session": dict(found.at_best(best).way.settings)}


def _settings(found: Tuning, best: Candidate) -> dict[str, str]:
    """The -x names and values that build it on the whole table."""
    chosen: Settings = best.settings
    values = {"index": chosen.index, "index_metric": chosen.index_metric}
    if chosen.index == "ivfflat":
        values["index_lists"] = str(found.lists(best))
    else:
        values |= {"index_m": str(chosen.index_m), "index_ef_construction": str(chosen.index_ef_construction)}
    return values | ({"index_halfvec": "on"} if best.half else {})


def _lines(found: Tuning) -> list[presentation.Line]:
    lines: list[presentation.Line] = [
        ("sample", f"{found.rows:,} of {found.of:,} rows in a temporary table, where builds aren't parallel"),
        ("indexes", f"{'':<{WIDTH}}{'build s':>9}{'MiB':>8}{'recall':>8}{'p50 ms':>9}{'p95 ms':>9}  searched with"),
    ]
    frontier = found.frontier()
    for number, one in enumerate(found.candidates):
        way = found.at_best(one)
        mark, cast = "*" if number in frontier else " ", ", halfvec" if one.half else ""
        built = f"{one.seconds:>9.1f}{one.bytes / 1024**2:>8.1f}"
        lines.append(("", _row(f"{mark} {one.plan.method} {one.plan.options}{cast}", built, way.all) + f"  {way.way}"))
    lines.append(("", _row("  none, every row is read", "", found.every_row.all)))
    lines.append(("", "* no other finds as much as fast"))
    best = found.best
    if best is None:
        return [*lines, ("best", f"none reaches a recall of {found.wanted:g}")]
    settings = _settings(found, best)
    return [
        *lines,
        ("best", " ".join(f"OM_{name.upper()}={value}" for name, value in settings.items())),
        ("", "openmemory-migrations index " + " ".join(f"-x {name}={value}" for name, value in settings.items())),
        ("", found.at_best(best).way.sql),
        ("then", "openmemory-migrations verify: the whole table may ask for more than the sample did"),
    ]


def _row(name: str, built: str, found: Figures) -> str:
    return f"{name:<{WIDTH}}{built:>17}{found.recall or 0:>8.3f}{found.p50_ms:>9.1f}{found.p95_ms:>9.1f}"
