"""What a migration adds to disk and WAL, by what was measured. Pure.

The figures are bench/growth.py's, as docs/scale.md shows them; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# engine -> (dimensions, bytes of the table a row, bytes of WAL a row)
MEASURED = {
    "client": ((256, 2381, 3793), (384, 3327, 5336), (1536, 8413, 7301), (3072, 13965, 14726)),
    "server": ((256, 1674, 3068), (384, 2422, 4396), (1536, 8349, 7158), (3072, 13872, 14568)),
}


@dataclass(frozen=True)
class Growth:
    """Bytes."""

    table: int
    wal: int


def growth(engine: str, dimensions: int, rows: int) -> Growth:
    """Between two measured dimensions along a straight line, beyond them in proportion to the nearest."""
    measured, table, wal = zip(*MEASURED[engine], strict=True)
    nearest = min(max(dimensions, measured[0]), measured[-1])
    factor = rows * dimensions / nearest
    return Growth(
        round(factor * float(np.interp(nearest, measured, table))),
        round(factor * float(np.interp(nearest, measured, wal))),
    )
