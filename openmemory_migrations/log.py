"""Log lines in PostgreSQL's manner.

The logger is a child of `alembic`: a stock env.py calls `fileConfig`, which disables every logger that exists already
and isn't named in alembic.ini, and `alembic` is named there.
"""

from __future__ import annotations

import logging
import math

logger = logging.getLogger("alembic.openmemory_migrations")


def notice(message: str, *, detail: str | None = None, hint: str | None = None) -> None:
    _write(logging.INFO, "NOTICE", message, detail, hint)


def warning(message: str, *, detail: str | None = None, hint: str | None = None) -> None:
    _write(logging.WARNING, "WARNING", message, detail, hint)


def server_message(text: str) -> None:
    """Passes a NOTICE or WARNING of the server on; it arrives as `NOTICE:  …` already."""
    level = logging.WARNING if text.startswith("WARNING") else logging.INFO
    for line in text.rstrip().splitlines():
        logger.log(level, "%s", line)


def _write(level: int, word: str, message: str, detail: str | None, hint: str | None) -> None:
    logger.log(level, "%s:  %s", word, message)
    if detail:
        logger.log(level, "DETAIL:  %s", detail)
    if hint:
        logger.log(level, "HINT:  %s", hint)


def share(part: float) -> str:
    """`97.2 %`, of a share between 0 and 1; never rounded up to one that isn't reached."""
    return f"{math.floor(1000 * part + 1e-6) / 10:g} %"


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def amount(octets: float) -> str:
    """`8.2 kB`, `1.5 GB`, in thousands."""
    for unit in ("kB", "MB", "GB"):
        octets /= 1000
        if octets < 1000:
            return f"{octets:,.1f} {unit}"
    return f"{octets / 1000:,.1f} TB"
