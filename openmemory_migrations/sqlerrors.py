"""The server's errors: which they are, and what they become for the operator."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, OperationalError

from .errors import ConnectionLost, MigrationError, TryAgain, UsageError

# SQLSTATE: connection exceptions, too many connections, the server is going down or on its way up
UNREACHABLE = ("08", "53300", "57P")
REFUSED = ("28", "3D")  # no such role or database, a wrong password
LOCK_NOT_AVAILABLE, DEADLOCK, CANCELED, SERIALIZATION_FAILURE = "55P03", "40P01", "57014", "40001"
UNDEFINED_TABLE, DENIED = "42P01", "42501"
# what another try may mend: somebody else's lock, a deadlock, a statement_timeout of the role's
PASSING = (LOCK_NOT_AVAILABLE, DEADLOCK, CANCELED, SERIALIZATION_FAILURE)
LOCKED = "Run the same command again when whoever has locked it is done."
ON_ITS_WAY = ("starting up", "shutting down", "recovery", "too many", "connection slots")  # the server


def sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlstate", None)


def as_migration_error(error: DBAPIError, doing: str) -> MigrationError:
    """The server's or the driver's own words as our error, without the statement and its parameters."""
    # psycopg keeps the server's message in parts as `diag`; asyncpg's error has them itself, behind SQLAlchemy's
    diagnostics = getattr(error.orig, "diag", None)
    own = error.orig if hasattr(error.orig, "detail") else getattr(error.orig, "__cause__", None)
    message = getattr(diagnostics, "message_primary", None) or getattr(own, "message", None)
    message = message or " ".join(str(error.orig).split())
    # from whoever knows more: "HINT:  …"
    ours = dict(line.split(":  ", 1) for line in error.detail)
    if error.connection_invalidated:
        return lost(doing, message, ours.get("HINT"))
    state = sqlstate(error)
    problem = MigrationError(
        f"{doing}: {message}" + (f" (SQLSTATE {state})" if state else ""),
        detail=ours.get("DETAIL") or getattr(diagnostics, "message_detail", None) or getattr(own, "detail", None),
        hint=ours.get("HINT")
        or (LOCKED if state == LOCK_NOT_AVAILABLE else None)
        or getattr(diagnostics, "message_hint", None)
        or getattr(own, "hint", None),
    )
    # psycopg2 has no SQLSTATE of a connection that was refused: what the server refuses for good it calls FATAL
    if state is None:
        away = "FATAL:" not in message or any(word in message for word in ON_ITS_WAY)
        away = away and isinstance(error, OperationalError)
        problem.exit_code = TryAgain.exit_code if away else UsageError.exit_code
    elif state.startswith(UNREACHABLE) or state in PASSING:
        problem.exit_code = TryAgain.exit_code
    elif state.startswith(REFUSED):
        problem.exit_code = UsageError.exit_code
    return problem


def lost(doing: str, message: str, hint: str | None = None) -> ConnectionLost:
    return ConnectionLost(
        f"{doing}: the connection was lost: {message}",
        hint=hint or "Run the same command again to continue; what is committed is kept.",
    )
