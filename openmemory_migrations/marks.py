"""What the comments begin with that this package writes on what it makes, and by which it knows its own again."""

from __future__ import annotations

MARK = "openmemory_migrations: "  # what each begins with
OWN = "openmemory_migrations: kept equal to "  # on a column of ours; what has it not is adopted
SET_ASIDE = "openmemory_migrations: set aside; "  # on an adopted column, before the comment that it had
CUT_OVER = "openmemory_migrations: cut over; "  # on the column of vectors, before what the undo has to know
TYPED = "openmemory_migrations: to take the place of "  # on the column that a bare vector gets its dimensions by
GIVEN = "openmemory_migrations: dimensions given; "  # on a vector that had none, before the comment that it had
KEPT = "openmemory_migrations: rows that no vector can hold, of "  # on the table that they were moved to
BACK = "openmemory_migrations: keeps in step with vectors: "  # on the trigger of a table that is cut over
INDEX = "openmemory_migrations: index of "  # on that of our vectors
GUARD = "openmemory_migrations: refuses, while a step is at work, what that step would lose"  # on its trigger


class Marked:
    """What a column says of itself; on one of another type it is not from us."""

    is_vector: bool
    comment: str

    def _has(self, mark: str) -> bool:
        return self.is_vector and self.comment.startswith(mark)

    @property
    def ours(self) -> bool:
        return self._has(OWN)

    @property
    def cut_over(self) -> bool:
        return self._has(CUT_OVER)

    @property
    def set_aside(self) -> bool:
        return self._has(SET_ASIDE)

    @property
    def typed(self) -> bool:
        """Whether it is ours, to take the place of vectors without dimensions."""
        return self._has(TYPED)

    @property
    def given(self) -> bool:
        """Whether it has its dimensions from us."""
        return self._has(GIVEN)
