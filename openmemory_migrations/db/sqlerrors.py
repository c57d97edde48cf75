"""The server's errors: which they are, and what they become for the operator."""

from __future__ import annotations

import re

from sqlalchemy.exc import DBAPIError, OperationalError

from ..errors import ConnectionLost, MigrationError, TryAgain, UsageError

# SQLSTATE: connection exceptions, too many connections, the server is going down or on its way up
UNREACHABLE = ("08", "53300", "57P")
REFUSED = ("28", "3D")  # no such role or database, a wrong password
LOCK_NOT_AVAILABLE, DEADLOCK, CANCELED, SERIALIZATION_FAILURE = "55P03", "40P01", "57014", "40001"
UNDEFINED_TABLE, DENIED, READ_ONLY = "42P01", "42501", "25006"
UNDEFINED = (UNDEFINED_TABLE, "42883", "42704", "3F000")  # a table, function or operator, type, schema
SHOWS_A_ROW = ("22", "23", "44")  # classes of SQLSTATE whose DETAIL may print the row that is refused
# what another try may mend: somebody else's lock, a deadlock, a statement_timeout of the role's
PASSING = (LOCK_NOT_AVAILABLE, DEADLOCK, CANCELED, SERIALIZATION_FAILURE)
HINTS = {
    LOCK_NOT_AVAILABLE: "Run the same command again when whoever has locked it is done.",
    READ_ONLY: "On a standby, set OM_DATABASE_URL, or OM_PG_HOST and OM_PG_PORT, to the primary. Elsewhere:"
    " SHOW default_transaction_read_only.",
}
# in the context of an error; a signature stays as it is in whatever language that is, a bare name is known in English.
# Nothing that comes behind a quote: that is the text of a statement, which may show what is in a row
FUNCTION = re.compile(
    r"""^(?:[^\n"'»«„“]*?PL/\w*?[^\n"'»«„“]*?\s((?:"(?:[^"\n]|"")+"|[\w$.])+\([^)\n]*\))"""
    r"""|(?:SQL|PL/\w+) function ("[^"\n]+"))""",
    re.MULTILINE,
)
ON_ITS_WAY = ("starting up", "shutting down", "recovery", "too many", "connection slots")  # the server


def sqlstate(error: DBAPIError) -> str | None:
    return _state(error.orig)


def _state(error: BaseException | None) -> str | None:
    return getattr(error, "pgcode", None) or getattr(error, "sqlstate", None)


def answered(error: BaseException | None) -> bool:
    """Whether the server has refused a statement and goes on: then the error's text says nothing of the connection."""
    state = _state(error)
    # a function of others' may raise whatever it likes, and the session goes on
    severity = _of(error, "severity_nonlocalized") or _of(error, "severity_en")
    return state is not None and (severity == "ERROR" or not state.startswith(("08", "57P")))


def constraint_of(error: DBAPIError) -> str | None:
    """The constraint that was violated."""
    return _diagnostic(error, "constraint_name")


def context_of(error: DBAPIError) -> str | None:
    """The functions that the error went through, one a line."""
    return _diagnostic(error, "context")


def functions_of(error: DBAPIError) -> list[str]:
    """Those that the error went through, the innermost first, but for ours, which writes."""
    found = [signature or name for signature, name in FUNCTION.findall(context_of(error) or "")]
    return [name for name in found if not name.endswith("openmemory_migrations_stage()")]


def in_statement(error: DBAPIError) -> bool:
    """Whether it points at a place in the text of a statement, which has failed before any row was looked at."""
    return any(_diagnostic(error, name) for name in ("statement_position", "position", "internal_position"))


def _diagnostic(error: DBAPIError, name: str) -> str | None:
    return _of(error.orig, name)


def _of(error: BaseException | None, name: str) -> str | None:
    # psycopg keeps the server's message in parts as `diag`; asyncpg's error has them itself, behind SQLAlchemy's
    own = error if hasattr(error, "detail") else getattr(error, "__cause__", None)
    return getattr(getattr(error, "diag", None), name, None) or getattr(own, name, None)


def as_migration_error(error: DBAPIError, doing: str) -> MigrationError:
    """The server's or the driver's own words as our error, without the statement and its parameters."""
    message = _diagnostic(error, "message_primary") or _diagnostic(error, "message")
    message = message or " ".join(str(error.orig).split())
    # from whoever knows more: "HINT:  …"
    ours = dict(line.split(":  ", 1) for line in error.detail)
    if error.connection_invalidated:
        return lost(doing, message, ours.get("HINT"))
    state = sqlstate(error)
    shows_a_row = (state or "").startswith(SHOWS_A_ROW)
    detail = None if shows_a_row else _diagnostic(error, "message_detail") or _diagnostic(error, "detail")
    hint = _diagnostic(error, "message_hint") or _diagnostic(error, "hint")
    if state in UNDEFINED and (theirs := functions_of(error)):
        # as an event trigger's, which fires for what we change
        detail = f"In function {theirs[0]}, which finds nothing without its schema in statements of this package."
        hint = f"ALTER FUNCTION {theirs[0]} SET search_path = …; with the schemas that it needs."
    problem = MigrationError(
        f"{doing}: {message}" + (f" (SQLSTATE {state})" if state else ""),
        detail=ours.get("DETAIL") or detail,
        hint=ours.get("HINT") or HINTS.get(state or "") or hint,
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
