"""The console script `openmemory-migrations`.

Data on stdout, messages on stderr. Exit codes: 0 done and right, 1 not right or refused, 2 usage or configuration,
3 try again: the database can't be reached, a lock was in the way for too long, ended by a signal.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from .. import __version__, log
from ..db.sqlerrors import as_migration_error
from ..errors import MigrationError
from . import backfill, chain, check, doctor, index, repair, report, status, stubs, tune, verify
from .command import Command, of

PROGRAM = "openmemory-migrations"
COMMANDS: dict[str, Command] = {
    "check": of(check),
    "status": of(status),
    **chain.COMMANDS,
    "backfill": of(backfill),
    "index": of(index),
    "repair": of(repair),
    "verify": of(verify),
    "tune": of(tune),
    "report": of(report),
    "stubs": of(stubs),
    "doctor": of(doctor),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an error of ours is printed without a traceback."""
    options = parser().parse_args(argv)
    _log_to_stderr(logging.WARNING if options.quiet else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names may have characters that the terminal has not
    try:
        return int(COMMANDS[options.command].run(options))
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MigrationError as error:
        print(f"ERROR:  {error}", file=sys.stderr)
        return error.exit_code
    except DBAPIError as error:
        problem = as_migration_error(error, "database")
        print(f"ERROR:  {problem}", file=sys.stderr)
        return problem.exit_code


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog=PROGRAM, description="OpenMemory's vectors from bytea to pgvector.")
    whole.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help, description=command.description)
        command.arguments(one)
        one.add_argument("--quiet", action="store_true", help="no messages but warnings and errors")
    return whole


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for logger in (log.logger, logging.getLogger("alembic")):
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


__all__ = ["COMMANDS", "main", "parser"]
