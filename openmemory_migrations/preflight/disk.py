"""What a migration adds to disk and WAL, by what was measured. Pure.

The figures are bench/growth.py's, as docs/scale.md shows them; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# (dimensions, bytes of the table a row, bytes of WAL a row) of the client; what the server converts itself is the same
MEASURED = ((256, 2381, 3794), (384, 3327, 5336), (1536, 8413, 7303), (3072, 13965, 14730))


@dataclass(frozen=True)
class Growth:
    """Bytes."""

    table: int
    wal: int


def growth(dimensions: int, rows: int) -> Growth:
    """Between two measured dimensions along a straight line, beyond them in proportion to the nearest."""
    measured, table, wal = zip(*MEASURED, strict=True)
    nearest = min(max(dimensions, measured[0]), measured[-1])
    factor = rows * dimensions / nearest
    return Growth(
        round(factor * float(np.interp(nearest, measured, table))),
        round(factor * float(np.interp(nearest, measured, wal))),
    )
