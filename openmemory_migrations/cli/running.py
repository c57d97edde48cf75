"""What commands share: settings from -x and the environment, and a step on one table, reconnecting when need be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.engine import Engine

from ..db.connections import engine_of, reconnecting, required_url
from ..db.database import Database
from ..errors import MigrationError, UsageError
from ..settings import Settings, refuse_unknown
from ..steps.step import Step
from ..target import Target

T = TypeVar("T")


def settings_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-x",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, as with alembic -x; the OM_* variables count as they do there",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which database, table and columns are meant."""
    settings_argument(parser)
    parser.add_argument("--column", default="v", help="of the bytes; default: v")
    parser.add_argument("--vector-column", default="v_vector", help="default: v_vector")


def configured(options: argparse.Namespace) -> tuple[Settings, Target]:
    """Raises UsageError for whatever can't be meant."""
    given: dict[str, str] = {}
    for text in options.x:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f'-x "{text}" is not NAME=VALUE', hint="Such as -x backfill_batch=500.")
        given[name] = value
    try:
        refuse_unknown(given)
        settings = Settings.load(given)
    except MigrationError as error:
        raise UsageError(error.message, detail=error.detail, hint=error.hint) from error
    columns = [getattr(options, name) for name in ("column", "vector_column") if hasattr(options, name)]
    return settings, Target(settings.pg_schema, settings.vector_table, *columns)


def on_postgres(options: argparse.Namespace, work: Callable[[Step], T]) -> T | None:
    """What `work` returns; None where OpenMemory isn't on Postgres. A lost connection begins it again."""
    settings, target = configured(options)
    try:
        url = required_url(settings)
    except MigrationError as error:
        raise UsageError(error.message, hint=error.hint) from error
    if url is None:
        return None
    if url.get_backend_name() == "sqlite":
        raise UsageError("SQLite keeps vectors as bytes: there is nothing to work on", hint="Set OM_DATABASE_URL.")
    with engine_of(url) as engine:
        return reconnecting(engine, lambda: _run(engine, settings, target, work))


def _run(engine: Engine, settings: Settings, target: Target, work: Callable[[Step], T]) -> T:
    with engine.connect() as connection:
        db = Database(connection, target.names())
        with db.session():
            db.take_over()
            step = Step.on(db, target, settings)
            db.commit()
            return work(step)
