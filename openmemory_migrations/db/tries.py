"""How often what stands in the way is tried again, and how long to rest before: of locks, batches, and in scripts."""

from __future__ import annotations

import random
from collections.abc import Iterator

TRIES = 30
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds
GROWTH = 1.5  # of a pause to the next
LEAST_SHARE = 0.5  # of a pause: the rest is chance, so that two runs don't meet for ever


def pauses() -> Iterator[float]:
    """Seconds to rest after each of the tries."""
    pause = FIRST_PAUSE
    for _ in range(TRIES):
        yield pause * random.uniform(LEAST_SHARE, 1.0)
        pause = min(pause * GROWTH, LONGEST_PAUSE)
