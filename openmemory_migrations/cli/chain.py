"""Alembic with the environment that is in the package, for who installed the wheel and has no alembic.ini."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from typing import TextIO

from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from ..columns.cutover_mark import NO_SCRIPT
from ..environment import CUTOVER
from ..errors import MigrationError, UsageError
from ..hosts import project
from . import output, running
from .command import Command


def upgrade(options: argparse.Namespace) -> int:
    _run(options, lambda config: command.upgrade(config, options.revision))
    return current(options) if options.json else 0


def downgrade(options: argparse.Namespace) -> int:
    _run(options, lambda config: command.downgrade(config, options.revision))
    return current(options) if options.json else 0


def current(options: argparse.Namespace) -> int:
    printed = io.StringIO()
    _run(options, command.current, printed)
    revisions = [line.split()[0] for line in printed.getvalue().splitlines()]
    lines = [("", line) for line in printed.getvalue().splitlines()]
    head = project.CUTOVER if hasattr(options, "section") else project.FINALIZE
    output.write(options, {"revisions": revisions, "at_head": revisions == [head]}, lines)
    return 0


def sql(options: argparse.Namespace) -> int:
    if options.down and ":" not in options.revisions:
        raise UsageError("a script down needs to know from where", hint="Such as: sql --down head:base.")
    direction = command.downgrade if options.down else command.upgrade
    printed = io.StringIO() if options.json else sys.stdout
    _run(options, lambda config: direction(config, options.revisions, sql=True), printed)
    if isinstance(printed, io.StringIO):
        output.write(options, {"script": printed.getvalue()}, [])
    return 0


def cutover(options: argparse.Namespace) -> int:
    """The same for the lineage that has one revision."""
    if options.sql:
        raise UsageError(NO_SCRIPT, hint=f"Run it online: openmemory-migrations cutover {options.do}.")
    options.section = CUTOVER
    if options.do == "current":
        return current(options)
    down = options.do == "downgrade"
    options.revision = "base" if down else "head"
    return downgrade(options) if down else upgrade(options)


def _run(options: argparse.Namespace, work: Callable[[Config], object], stdout: TextIO = sys.stdout) -> None:
    running.configured(options)  # what can't be meant is said before Alembic begins
    section = getattr(options, "section", "alembic")
    config = Config(ini_section=section, cmd_opts=argparse.Namespace(x=options.x), stdout=stdout, output_buffer=stdout)
    config.set_main_option("script_location", f"{project.PACKAGE}:packaged")
    config.set_main_option("version_locations", project.CUTOVER_LOCATION if section == CUTOVER else project.LOCATION)
    config.set_main_option(project.SEPARATOR, "space")
    try:
        work(config)
    except MigrationError:
        raise
    except CommandError as error:  # a revision that there isn't
        raise UsageError(str(error)) from error


def _settings(parser: argparse.ArgumentParser) -> None:
    running.settings_argument(parser)
    output.arguments(parser)


def _to_head(parser: argparse.ArgumentParser) -> None:
    _settings(parser)
    parser.add_argument("revision", nargs="?", default="head", help="default: head")


def _down_to(parser: argparse.ArgumentParser) -> None:
    _settings(parser)
    parser.add_argument("revision", help="such as base, -1 or om_20240107_backfill")


def _script(parser: argparse.ArgumentParser) -> None:
    _settings(parser)
    parser.add_argument("revisions", nargs="?", default="head", help="one, or FROM:TO; default: head")
    parser.add_argument("--down", action="store_true", help="the way back, FROM:TO such as head:base")


def _to_cut_over(parser: argparse.ArgumentParser) -> None:
    _settings(parser)
    parser.add_argument(
        "do", choices=("upgrade", "downgrade", "current"), help="upgrade needs OM_CUTOVER, swap or drop"
    )
    # known so that it is refused with the command to run; to argparse it would be an unknown argument
    parser.add_argument("--sql", action="store_true", help=argparse.SUPPRESS)


COMMANDS = {
    "upgrade": Command("run the chain up, as `alembic upgrade` does", _to_head, upgrade),
    "downgrade": Command("run the chain down, as `alembic downgrade` does", _down_to, downgrade),
    "current": Command("print the revision that the database is stamped with", _settings, current),
    "sql": Command("print the chain as a script for psql, as `alembic upgrade --sql` does", _script, sql),
    "cutover": Command("the last step, and the way back, as `alembic -n cutover` does", _to_cut_over, cutover),
}
