"""The one error that this package raises on purpose: PostgreSQL's manner, shown by Alembic without a traceback."""

from __future__ import annotations

from alembic.util import CommandError

# for hints: never "downgrade base", which in a host's chain would take the host's own tables away
ANEW = "alembic downgrade om_20240107_pgvector-1, then alembic upgrade head"
INDEX_ANEW = "openmemory-migrations index"


class MigrationError(CommandError):
    """Something that the operator can mend.

    A `CommandError`, because that is what Alembic's command line prints as `FAILED: …` and turns into its exit code;
    any other exception reaches the operator as a traceback. `exit_code` is that of our own console script.
    """

    exit_code = 1

    def __init__(self, message: str, *, detail: str | None = None, hint: str | None = None) -> None:
        self.message, self.detail, self.hint = message, detail, hint
        lines = [message]
        if detail:
            lines.append(f"DETAIL:  {detail}")
        if hint:
            lines.append(f"HINT:  {hint}")
        super().__init__("\n".join(lines))


class ConnectionLost(MigrationError):
    """The server or the network took the connection away; what is committed is kept."""

    exit_code = 2


class TryAgain(MigrationError):
    """Somebody's lock, or another run, stood in the way for too long; the same command can work later."""

    exit_code = 3


class UsageError(MigrationError):
    """Something in the command line or the configuration that leaves nothing to work with."""

    exit_code = 2


class Changed(MigrationError):
    """The table isn't what it was when it was looked at."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="Run the same command again.")
