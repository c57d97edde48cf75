"""The server's errors: which they are, and what they become for the operator."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from .errors import ConnectionLost, MigrationError

# SQLSTATE: connection exceptions, no such role or database, the server is going down or on its way up
NO_CONNECTION = ("08", "28", "3D", "57P")
LOCK_NOT_AVAILABLE, DEADLOCK, CANCELED, SERIALIZATION_FAILURE = "55P03", "40P01", "57014", "40001"
UNDEFINED_TABLE = "42P01"
SHOWS_A_ROW = ("22", "23", "44")  # classes of SQLSTATE whose DETAIL may print the row that is refused


def sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlstate", None)


def constraint_of(error: DBAPIError) -> str | None:
    """The constraint that was violated."""
    return _diagnostic(error, "constraint_name")


def context_of(error: DBAPIError) -> str | None:
    """The functions that the error went through, one a line."""
    return _diagnostic(error, "context")


def _diagnostic(error: DBAPIError, name: str) -> str | None:
    # psycopg keeps the server's message in parts as `diag`; asyncpg's error has them itself, behind SQLAlchemy's
    own = error.orig if hasattr(error.orig, "detail") else getattr(error.orig, "__cause__", None)
    return getattr(getattr(error.orig, "diag", None), name, None) or getattr(own, name, None)


def as_migration_error(error: DBAPIError, doing: str) -> MigrationError:
    """The server's or the driver's own words as our error, without the statement and its parameters."""
    message = _diagnostic(error, "message_primary") or _diagnostic(error, "message")
    message = message or " ".join(str(error.orig).split())
    if error.connection_invalidated:
        return ConnectionLost(
            f"{doing}: the connection was lost: {message}",
            hint="Run the same command again to continue; what is committed is kept.",
        )
    state = sqlstate(error)
    problem = MigrationError(
        f"{doing}: {message}" + (f" (SQLSTATE {state})" if state else ""),
        detail=None
        if (state or "").startswith(SHOWS_A_ROW)
        else _diagnostic(error, "message_detail") or _diagnostic(error, "detail"),
        hint=_diagnostic(error, "message_hint") or _diagnostic(error, "hint"),
    )
    if state is None or state.startswith(NO_CONNECTION):
        problem.exit_code = ConnectionLost.exit_code
    return problem
