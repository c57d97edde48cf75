"""The pictures of a report, as SVG by matplotlib: the extra `report`. Without it there are none."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..verify.norms import Norms
from ..verify.recall import Quality

OURS, OTHER = "#336791", "#b0b0b0"


def pyplot() -> Any:
    """None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # as text: it can be searched, and read aloud
    matplotlib.rcParams["svg.hashsalt"] = "openmemory-migrations"  # the same picture is the same file
    from matplotlib import pyplot as plt

    return plt


def recall_against_latency(plt: Any, quality: Quality) -> str:
    figure, axis = plt.subplots(figsize=(7, 4))
    series: dict[tuple[str, ...], list[tuple[float, float, str]]] = {}
    for one in quality.tried:
        point = (one.all.p50_ms, one.all.recall or 0, next(iter(one.way.settings.values())))
        series.setdefault(tuple(one.way.settings)[1:], []).append(point)
    for more, points in series.items():
        name = f"{quality.searched.method}, {next(iter(quality.tried[0].way.settings))}"
        times, recalls, _ = zip(*points, strict=True)
        axis.plot(times, recalls, "o-", label=name + (f", {', '.join(more)}" if more else ""))
        for time, recall, value in points:
            axis.annotate(value, (time, recall), textcoords="offset points", xytext=(5, -10), fontsize=8)
    for name, one, mark in (
        ("a session by default", quality.session, "D"),
        ("every row, without an index", quality.every_row, "s"),
    ):
        axis.plot(one.all.p50_ms, one.all.recall or 0, mark, label=name, markersize=8)
    axis.axhline(quality.wanted, color=OTHER, linestyle="--", label=f"wanted: {quality.wanted:g}")
    axis.set(xscale="log", xlabel="milliseconds a search (median)", ylabel=f"recall@{quality.k}", ylim=(-0.02, 1.05))
    for formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.legend(fontsize=8, loc="lower right")
    return _svg(plt, figure)


def lengths(plt: Any, rows: Mapping[str, int]) -> str:
    figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(rows)))
    bars = axis.barh(list(rows), list(rows.values()), color=OURS)
    axis.bar_label(bars, [f"{number:,}" for number in rows.values()], padding=3)
    axis.invert_yaxis()
    axis.set(xlabel="rows", xlim=(0, 1.2 * max(rows.values())))
    return _svg(plt, figure)


def norms(plt: Any, found: Norms) -> str:
    figure, axis = plt.subplots(figsize=(7, 3))
    bins: Sequence[tuple[float, float, int]] = found.bins()
    axis.bar(
        [low for low, _, _ in bins],
        [rows for _, _, rows in bins],
        width=[high - low for low, high, _ in bins],
        align="edge",
        color=OURS,
    )
    axis.set(xlabel="length of the vector (L2 norm)", ylabel="rows")
    if bins[-1][1] > 100 * bins[0][0]:
        axis.set_xscale("log")
    else:  # all of one length are a line, and not a wall
        middle, width = (bins[0][0] + bins[-1][1]) / 2, bins[-1][1] - bins[0][0]
        axis.set_xlim(middle - max(width, middle / 2), middle + max(width, middle / 2))
    return _svg(plt, figure)


def _svg(plt: Any, figure: Any) -> str:
    written = io.StringIO()
    figure.tight_layout()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return written.getvalue()[written.getvalue().index("<svg") :]
