"""How the lengths (norms) of vectors are spread, in bins of equal ratio. Pure; what it keeps has one size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LOW, HIGH, BINS_A_DECADE = -8, 8, 200  # 10^-8 to 10^8, each bin 1.2 % wide


class Norms:
    """Of all rows that have passed by; float32, as finite as their elements are."""

    def __init__(self) -> None:
        self.rows = self.zeros = 0
        self.least, self.most, self.total = np.inf, 0.0, 0.0
        self.counts = np.zeros((HIGH - LOW) * BINS_A_DECADE + 2, np.int64)  # the ends take what is beyond

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """(rows, dimensions); a row that isn't finite is left out."""
        lengths = np.linalg.norm(values.astype(np.float64), axis=1)
        lengths = lengths[np.isfinite(lengths)]
        if not len(lengths):
            return
        self.rows += len(lengths)
        self.zeros += int((lengths == 0).sum())
        self.least, self.most = min(self.least, lengths.min()), max(self.most, lengths.max())
        self.total += lengths.sum()
        some = lengths[lengths > 0]
        places = np.rint((np.log10(some) - LOW) * BINS_A_DECADE).astype(np.int64) + 1
        self.counts += np.bincount(np.clip(places, 0, len(self.counts) - 1), minlength=len(self.counts))

    @property
    def mean(self) -> float | None:
        return float(self.total / self.rows) if self.rows else None

    def bins(self) -> list[tuple[float, float, int]]:
        """Each bin from the first that holds something to the last: its bounds, and its rows."""
        held = np.flatnonzero(self.counts)
        if not len(held):
            return []
        # 1, which most vectors are long, is in the middle of a bin
        bound = [10 ** (LOW + (place - 1.5) / BINS_A_DECADE) for place in range(len(self.counts) + 1)]
        return [(bound[i], bound[i + 1], int(self.counts[i])) for i in range(held[0], held[-1] + 1)]
