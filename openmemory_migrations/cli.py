"""The console script `openmemory-migrations`.

Data on stdout, messages on stderr. Exit codes: 0 fine, 1 not fine, 2 usage, configuration or connection.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from sqlalchemy.exc import DBAPIError

from . import __version__, doctor, log, stubs
from .commands import backfill
from .errors import MigrationError
from .sqlerrors import as_migration_error

PROGRAM = "openmemory-migrations"
# a command is a module with arguments(parser) and run(options) -> exit code; its docstring's first line is the help
COMMANDS: dict[str, ModuleType] = {"backfill": backfill, "stubs": stubs, "doctor": doctor}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an error of ours is printed without a traceback."""
    options = parser().parse_args(argv)
    _log_to_stderr()
    try:
        return int(COMMANDS[options.command].run(options))
    except MigrationError as error:
        print(f"ERROR:  {error}", file=sys.stderr)
        return error.exit_code
    except DBAPIError as error:
        print(f"ERROR:  {as_migration_error(error, 'database')}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog=PROGRAM, description="OpenMemory's vectors from bytea to pgvector.")
    whole.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        description = (module.__doc__ or "").partition("\n\n")[0]
        command = commands.add_parser(name, help=description, description=description)
        module.arguments(command)
    return whole


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.logger.handlers = [handler]
    log.logger.setLevel(logging.INFO)
    log.logger.propagate = False


__all__ = ["COMMANDS", "main", "parser"]
