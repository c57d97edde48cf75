"""How runs share a table without a coordinator: who is at a part of it holds an advisory lock, and others pass it by.

The locks belong to transactions, so a run that is killed gives them up. They are for speed only: what keeps a row right
is the guard in its write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..db import locks
from ..db.database import Database
from ..sql import blocks

BLOCKS = blocks("backfill")

Claim = tuple[int, int]  # both halves of the lock's key as pg_locks shows them, unsigned


@dataclass
class Claims:
    """What one worker has got, and what it found taken, since its pass began."""

    heeded: bool = True  # False: goes everywhere, whatever others have claimed
    got: set[Claim] = field(default_factory=set)
    refused: set[Claim] = field(default_factory=set)

    def take(self, db: Database, space: int, numbers: Sequence[int]) -> list[int]:
        """Those of the parts `numbers` that are nobody else's, ours until the end of the transaction."""
        if not self.heeded:
            return list(numbers)
        found = db.rows(BLOCKS.claim, {"numbers": list(numbers), "space": space})
        taken = [row[0] for row in found]
        self.got.update(_claims(space, taken))
        self.refused.update(_claims(space, set(numbers) - set(taken)))
        return taken


def of_others(workers: Sequence[Claims]) -> set[Claim]:
    """What none of this run's workers has got."""
    got: set[Claim] = set().union(*(claims.got for claims in list(workers)))
    return set().union(*(claims.refused for claims in list(workers))) - got


def held(db: Database) -> set[Claim]:
    """All that anybody has claimed in this database."""
    return {(space, number) for space, number in db.rows(BLOCKS.claimed)}


def space_of(*parts: str) -> int:
    """Where the parts of a table are claimed: the first half of an advisory lock's key."""
    return locks.key_of("units", *parts) >> 32


def _claims(space: int, numbers: Sequence[int] | set[int]) -> set[Claim]:
    return {(space % 2**32, number % 2**32) for number in numbers}
