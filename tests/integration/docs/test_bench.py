"""`make bench` runs, and what the README says of speed is what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.__main__ import AT_DEFAULTS
from bench.ways import WAYS
from demo.openmemory import environment
from tests.support.commands import ROOT

RESULTS = json.loads((ROOT / "docs/bench/bench.json").read_text())


def test_the_tables_in_the_readme_and_on_the_page_are_what_was_measured() -> None:
    at_1536 = report.ways([measured for measured in RESULTS["ways"] if measured["dimensions"] == 1536])
    assert at_1536 in (ROOT / "README.md").read_text()
    performance, scale = ((ROOT / f"docs/{name}.md").read_text() for name in ("performance", "scale"))
    for name, write in report.PARTS.items():
        for part in write(RESULTS[name]).split("\n\n"):
            assert part in (scale if name in ("scaling", "growth") else performance)
    assert report.expected(RESULTS) in scale
    assert RESULTS["machine"] in performance


def test_the_readme_quotes_the_other_set_of_settings_too() -> None:
    rates = {m["way"]: m["rows_per_second"] for m in RESULTS["defaults"] if m["dimensions"] == 1536}
    said = ", ".join(f"{way} {rates[way] / rates['floor']:.2f}" for way in AT_DEFAULTS if way != "floor")
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_the_figures_are_those_of_all_ways_and_of_whole_tables() -> None:
    for dimensions in (256, 1536, 3072):
        here = {m["way"]: m for m in RESULTS["ways"] if m["dimensions"] == dimensions}
        assert set(here) == set(WAYS)
        for way in ("floor", *(name for name in WAYS if name.startswith("ours"))):
            assert {run["rows"] for run in here[way]["runs"]} == {here[way]["rows"]}
            assert len(here[way]["runs"]) >= 3


def bench(output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Run it; return what it has written and what it has printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--rounds", "1", "--output", str(output), *options],
        cwd=ROOT,
        env=environment(None, {}),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    return json.loads((output / "bench.json").read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_parts_on_scale_run(tmp_path: Path) -> None:
    results, printed = bench(tmp_path, "--parts", "scaling", "growth", "--share", "0.02", "--large-rows", "1000")

    assert {(m["engine"], m["processes"]) for m in results["scaling"]} == {
        (engine, processes) for engine in ("client", "server") for processes in (1, 2, 4)
    }
    assert all(m["grown"] > 4 * m["dimensions"] / 2 for m in results["growth"]["rows"])
    assert results["growth"]["large"]["rows"] == 1000
    assert report.scaling(results["scaling"]) in printed
    assert report.growth(results["growth"]) in printed


@pytest.mark.slow
@pytest.mark.exhaustive  # CI has the report of what was measured
def test_it_runs(tmp_path: Path) -> None:
    rows = ("--rows", "400", "--dimensions", "1536", "--slow-rows", "50", "--most-rows", "10000")

    results, printed = bench(tmp_path, *rows, "--parts", "ways", "defaults", "sizes")

    assert {m["way"] for m in results["ways"]} == set(WAYS)
    assert {m["rows"] for m in results["ways"]} == {400}
    assert {run["rows"] for m in results["ways"] if m["way"].startswith("ours") for run in m["runs"]} == {400}
    assert {m["way"] for m in results["defaults"]} == set(AT_DEFAULTS)
    assert all(m["rows_per_second"] > 0 for m in results["ways"] + results["defaults"])
    assert [m["dimensions"] for m in results["sizes"]["tables"]] == [64, 1536, 16_000]
    assert report.text(results) in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"bench.json"}
