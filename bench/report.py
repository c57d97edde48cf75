"""The figures as tables, and as pictures where matplotlib is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openmemory_migrations import log
from openmemory_migrations.db.catalog import Extension
from openmemory_migrations.index import choice as indexes_plan
from openmemory_migrations.settings import Settings
from openmemory_migrations.target import Target

FLOOR, OLD, USUAL = "floor", "row by row", "execute_values"


def text(results: dict[str, Any]) -> str:
    parts = [f"Measured on {results['machine']}."]
    for name, write in PARTS.items():
        if name in results:
            parts.append(write(results[name]))
    return "\n\n".join(parts)


def ways(measured: list[dict[str, Any]]) -> str:
    lines = []
    for dimensions in dict.fromkeys(m["dimensions"] for m in measured):
        here = {m["way"]: m for m in measured if m["dimensions"] == dimensions}
        rates = {way: m["rows_per_second"] for way, m in here.items()}
        rows = next(iter(here.values()))["rows"]
        lines += [
            f"{rows:,} rows of {dimensions:,} dimensions:",
            "",
            "| way | rows/s | of the floor | times row by row | times execute_values | peak MiB of the process |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for way, m in here.items():
            own = m["rows_per_second"]
            cells = [_ratio(own, rates.get(other)) for other in (FLOOR, OLD, USUAL)]
            lines.append(f"| {way} | {own:,.0f} | {' | '.join(cells)} | {m['peak_mib']:.0f} |")
        lines.append("")
    return "\n".join(lines).strip()


def sizes(measured: dict[str, Any]) -> str:
    lines = ["| rows | dimensions | rows/s | first tenth | last tenth | peak MiB |", "|---:|---:|---:|---:|---:|---:|"]
    for m in measured["tables"]:
        tenths = " | ".join(f"{m[name]:,.0f}" if m.get(name) else "-" for name in ("first_tenth", "last_tenth"))
        lines.append(
            f"| {m['rows']:,} | {m['dimensions']:,} | {m['rows_per_second']:,.0f} | {tenths} | {m['peak_mib']:.0f} |"
        )
    if floor := measured.get("floor"):
        tenths = f"{floor['first_tenth']:,.0f} | {floor['last_tenth']:,.0f}"
        rate = f"{floor['rows_per_second']:,.0f}"
        lines.append(f"| {floor['rows']:,}, the floor | {floor['dimensions']:,} | {rate} | {tenths} | - |")
    if resumed := measured.get("resumed"):
        lines.append(
            f"\nA run stopped at {resumed['done_percent']:.1f} % and run again: {resumed['seconds']:.1f} s, where the"
            f" whole takes {resumed['whole_seconds']:.1f} s ({resumed['seconds'] / resumed['whole_seconds']:.0%})."
        )
    return "\n".join(lines)


def blocks(measured: list[dict[str, Any]]) -> str:
    lines = [
        "| way | blocks of the table read | of its size at the end | blocks of its indexes read | WAL a row |",
        "|---|---:|---:|---:|---:|",
    ]
    for m in measured:
        lines.append(
            f"| {m['way']} | {m['table']:,} | {m['table'] / m['pages']:.2f} | {m['index']:,} |"
            f" {m['wal'] / m['rows'] / 1024:.1f} KiB |"
        )
    return "\n".join(lines)


def indexes(measured: list[dict[str, Any]]) -> str:
    lines = ["| index | rows | settings | seconds | of the defaults' |", "|---|---:|---|---:|---:|"]
    for m in measured:
        lines.append(
            f"| {m['index']} | {m['rows']:,} | {m['settings']} | {m['seconds']:.2f} |"
            f" {m['seconds'] / m['default_seconds']:.2f} |"
        )
    return "\n".join(lines)


def scaling(measured: list[dict[str, Any]]) -> str:
    lines = [
        "| engine | pause a batch | processes | rows | rows/s | times one process |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for m in measured:
        (one,) = (
            other["rows_per_second"]
            for other in measured
            if (other["engine"], other["pause_ms"], other["processes"]) == (m["engine"], m["pause_ms"], 1)
        )
        lines.append(
            f"| {m['engine']} | {m['pause_ms']} ms | {m['processes']} | {m['rows']:,} | {m['rows_per_second']:,.0f} |"
            f" {m['rows_per_second'] / one:.2f} |"
        )
    return "\n".join(lines)


def growth(measured: dict[str, Any]) -> str:
    lines = [
        "| dimensions | engine | bytes a row before | grown by | needed once rewritten | WAL |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for m in measured["rows"]:
        lines.append(
            f"| {m['dimensions']:,} | {m['engine']} | {m['before']:,.0f} | {m['grown']:,.0f} | {m['needed']:,.0f} |"
            f" {m['wal']:,.0f} |"
        )
    if large := measured.get("large"):
        gib = large["rows"] / 1024**3
        lines.append(
            f"\nThe largest run: {large['rows']:,} rows of {large['dimensions']} dimensions with two workers in"
            f" {large['seconds']:,.0f} s ({large['rows_per_second']:,.0f} rows/s); the table was"
            f" {large['before'] * gib:.1f} GiB and grew by {large['grown'] * gib:.1f} GiB, with"
            f" {large['wal'] * gib:.1f} GiB of WAL."
        )
    return "\n".join(lines)


def expected(results: dict[str, Any]) -> str:
    """What to expect of tables from 10⁵ to 10⁹ rows: measured a row, times rows; memory by pgvector's own formulas."""
    lines = [
        "| rows | dimensions | time | table grows by | WAL | memory of an ivfflat build | of an hnsw build |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for dimensions in (256, 1536):
        (rate,) = (m["rows_per_second"] for m in results["ways"] if (m["way"], m["dimensions"]) == ("ours", dimensions))
        (grown,) = (m for m in results["growth"]["rows"] if (m["engine"], m["dimensions"]) == ("client", dimensions))
        for power in range(5, 10):
            rows = 10**power
            memory = " | ".join(_memory(method, dimensions, rows) for method in ("ivfflat", "hnsw"))
            lines.append(
                f"| {rows:,} | {dimensions:,} | {log.duration(rows / rate)} | {log.amount(rows * grown['grown'])} |"
                f" {log.amount(rows * grown['wal'])} | {memory} |"
            )
    return "\n".join(lines)


def _memory(method: str, dimensions: int, rows: int) -> str:
    plan = indexes_plan.plan(
        Target("public", "openmemory_vectors"), Settings(index=method), Extension("public", (0, 8)), dimensions, rows
    )
    return log.amount(plan.memory_kb * 1024) if isinstance(plan, indexes_plan.Plan) else plan.reason


PARTS: dict[str, Callable[[Any], str]] = {
    "ways": ways,
    "defaults": ways,
    "sizes": sizes,
    "blocks": blocks,
    "indexes": indexes,
    "scaling": scaling,
    "growth": growth,
}


def _ratio(own: float, other: float | None) -> str:
    return f"{own / other:.2f}" if other else "-"


def pictures(results: dict[str, Any], folder: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no pictures: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    if "ways" in results:
        _ratio_bars(plt, results["ways"], folder / "ratios.svg")
    if "sizes" in results:
        _rate_against_size(plt, results["sizes"]["tables"], folder / "sizes.svg")


def _ratio_bars(plt: Any, measured: list[dict[str, Any]], file: Path) -> None:
    sizes = list(dict.fromkeys(m["dimensions"] for m in measured))
    figure, axes = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 3.2), sharey=True, squeeze=False)
    for axis, dimensions in zip(axes[0], sizes, strict=True):
        here = {m["way"]: m["rows_per_second"] for m in measured if m["dimensions"] == dimensions}
        names = list(reversed(here))
        ratios = [here[name] / here[FLOOR] for name in names]
        bars = axis.barh(names, ratios, color=["#336791" if n.startswith("ours") else "#b0b0b0" for n in names])
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
        axis.set(title=f"{dimensions:,} dimensions", xlabel="rows/s, floor = 1", xlim=(0, 1.2 * max(ratios)))
    _save(plt, figure, file)


def _rate_against_size(plt: Any, measured: list[dict[str, Any]], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(5, 3.2))
    here = [m for m in measured if m["dimensions"] == 64]
    axis.plot([m["rows"] for m in here], [m["rows_per_second"] for m in here], "o-", color="#336791")
    axis.set(xscale="log", xlabel="rows in the table (64 dimensions)", ylabel="rows/s", ylim=(0, None))
    _save(plt, figure, file)


def _save(plt: Any, figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
