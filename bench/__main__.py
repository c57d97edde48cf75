"""How fast `v` becomes `v_vector`: rivals, floor and ours, on the same rows, in turn: `python -m bench --help`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.openmemory import drop_database
from openmemory_migrations import embedded
from openmemory_migrations.embedded import Server

from . import blocks, growth, indexes, report, scaling, sizes
from .machine import OPTIONS, machine
from .rows import copied, make
from .ways import WAYS, run

SLOW = {"row by row", "execute_values", "pgvector-python"}  # their rate is that of the first rows
AT_DEFAULTS = ("floor", "ours", "ours, 2 workers", "ours, client engine", "ours, client engine, 2 workers")
PARTS = ("ways", "defaults", "sizes", "blocks", "indexes", "scaling", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=40_000, help="of 1,536 dimensions; as many bytes at other dimensions"
    )
    parser.add_argument("--dimensions", type=int, nargs="+", default=[256, 1536, 3072])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rows", type=int, default=3000, help="after which the slow ways are stopped")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--most-rows", type=int, default=1_000_000, help="of the largest table in part sizes")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows in parts scaling and growth")
    parser.add_argument("--large-rows", type=int, default=4_000_000, help="of the one large table in part growth, or 0")
    parser.add_argument("--output", type=Path, default=Path("docs/bench"), help="folder for bench.json and pictures")
    options = parser.parse_args()

    results: dict[str, Any] = {"machine": machine(), "settings": OPTIONS}
    with embedded.temporary(options=OPTIONS) as server:
        os.environ["BENCH_PSQL"] = str(server.psql)
        if "ways" in options.parts:
            results["ways"] = compare(server, options, options.dimensions, options.ways)
        if "sizes" in options.parts:
            results["sizes"] = sizes.measure(server, options.most_rows)
        if "scaling" in options.parts:
            results["scaling"] = scaling.measure(server, options.share, options.rounds)
    if "defaults" in options.parts:
        # PostgreSQL's own settings, checkpoints and autovacuum as they come
        with embedded.temporary() as server:
            dimensions = [size for size in options.dimensions if size <= 1536]
            results["defaults"] = compare(server, options, dimensions, AT_DEFAULTS)
    if "growth" in options.parts:
        results["growth"] = growth.measure(options.share, 256, options.large_rows)
    if "blocks" in options.parts:
        results["blocks"] = blocks.measure()
    if "indexes" in options.parts:
        results["indexes"] = indexes.measure()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    print(report.text(results))
    report.pictures(results, options.output)


def compare(
    server: Server, options: argparse.Namespace, sizes: Sequence[int], ways: Sequence[str]
) -> list[dict[str, Any]]:
    found = []
    for dimensions in sizes:
        rows = options.rows * 1536 // dimensions
        template = make(server, f"rows_{dimensions}", dimensions, rows)
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name in ways:
                with copied(server, template) as database:
                    most = options.slow_rows if name in SLOW else sys.maxsize
                    taken[name].append(run(database, name, dimensions, most))
                rate = taken[name][-1]["rows"] / taken[name][-1]["seconds"]
                print(f"{dimensions} dimensions, round {number + 1}, {name}: {rate:,.0f} rows/s", file=sys.stderr)
        drop_database(server, template.name)
        found += [
            {
                "dimensions": dimensions,
                "rows": rows,
                "way": name,
                "rows_per_second": statistics.median(r["rows"] / r["seconds"] for r in runs),
                "peak_mib": max(r["peak_kib"] for r in runs) / 1024,
                "runs": runs,
            }
            for name, runs in taken.items()
        ]
    return found


if __name__ == "__main__":
    main()
