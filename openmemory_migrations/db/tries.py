"""How often what stands in the way is tried again, and how long to rest before: of locks, batches, and in scripts."""

from __future__ import annotations

import random
from collections.abc import Iterator

TRIES = 30
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds
GROWTH = 1.5  # of a pause to the next
LEAST_SHARE = 0.5  # of a pause: the rest is chance, so that two runs don't meet for ever


def attempts() -> Iterator[tuple[int, float | None]]:
    """Each of the tries: its number, from 1, and the seconds to rest after it, None after the last."""
    return enumerate((*pauses(), None), 1)


def pauses() -> Iterator[float]:
    """Seconds to rest between two tries."""
    pause = FIRST_PAUSE
    for _ in range(TRIES - 1):
        yield pause * random.uniform(LEAST_SHARE, 1.0)
        pause = min(pause * GROWTH, LONGEST_PAUSE)
