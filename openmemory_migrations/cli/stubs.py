"""Writes the three revisions, or the cutover's, into a host application's own folder, in its own linear history.

All or nothing: every check comes before the first file, and what was written is taken back if Alembic doesn't find it
where it should be. The files call `ops`, so that they stay as short as they are when the package moves on.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from .. import log
from ..errors import MigrationError, UsageError
from ..hosts import project, stub_files
from ..hosts.stub_files import Stub
from ..ops import SETTING, Options
from ..settings import OPTIONS, Settings
from . import output

# what belongs to one run or one database is left to OM_*: it would be frozen in every environment
OPERATIONAL = (
    "batch",
    "engine",
    "workers",
    "pause_ms",
    "max_lag",
    "stop_at_slot_lag",
    "index_memory",
    "lock_timeout_ms",
    "accept_loss",
)
HINTS = {name: hint for name, hint in get_type_hints(Options).items() if name not in OPERATIONAL}


def arguments(parser: argparse.ArgumentParser) -> None:
    project.arguments(parser)
    output.arguments(parser)
    parser.add_argument("--directory", type=Path, help="the host's versions folder; default: the configuration's")
    parser.add_argument(
        "--down-revision", metavar="REVISION", help="the host's head, or base; default: the only head there is"
    )
    parser.add_argument("--engine-name", metavar="NAME", help="multidb: the one database that has the table")
    for name, hint in HINTS.items():
        parser.add_argument("--" + name.replace("_", "-"), help=_help(name), **_type(hint))


def _help(name: str) -> str:
    of_settings = OPTIONS.get(SETTING.get(name, name))
    known = {
        "column": "column of float32 bytes; default: v",
        "vector_column": "column of vectors; default: v_vector",
        "cutover": "write the last step, by itself, and not the first three",
    }
    return known.get(name) or f"default: {of_settings.variable if of_settings else 'none'}"


def _type(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": "N" if hint is int else "NAME"}


def run(options: argparse.Namespace) -> int:
    config = project.configuration(options)
    given = {name: value for name in HINTS if (value := getattr(options, name)) is not None}
    _check_options(given)
    script = project.script_directory(config) if config else None
    if script:
        _refuse_both_ways(script)
    directory = _directory(options.directory, script)
    # without a configuration, a folder of revisions is a history all the same
    script = script or ScriptDirectory(str(directory.parent), version_locations=[str(directory)])
    revisions = [revision for _, revision, _ in stub_files.steps(given)]
    _refuse_second_time(directory, revisions)
    parent = _down_revision(options.down_revision, script)
    if parent is None and options.down_revision is None:
        log.notice("the host has no revisions yet: these become its first")
    stubs = list(stub_files.stubs(script, directory, parent, given, options.engine_name))
    _refuse_overwriting(stubs)
    stub_files.write(stubs, lambda: _check_written(config, revisions))
    files = [_short(stub.path) for stub in stubs]
    output.write(options, {"written": files}, [("", file) for file in files])
    _say_what_is_next(config, parent, given, options.engine_name)
    return 0


def _check_options(given: Mapping[str, Any]) -> None:
    """Raises UsageError for a value that the step would refuse when it runs."""
    empty = [name for name, value in given.items() if value == ""]  # which counts as unset everywhere else
    if empty:
        raise UsageError(f"--{empty[0].replace('_', '-')} is empty")
    if given.get("column", "v") == given.get("vector_column", "v_vector"):
        raise UsageError("--column and --vector-column are the same", hint="The bytes stay in a column of their own.")
    columns = [{"vector_table": given[name]} for name in ("column", "vector_column") if name in given]
    values = {SETTING.get(name, name): value for name, value in given.items()}
    try:
        for one in (values, *columns):
            Settings.load({name: value for name, value in one.items() if name in OPTIONS}, environ={})
    except MigrationError as error:
        raise UsageError(error.message, detail=error.detail, hint=error.hint) from error


def _refuse_both_ways(script: ScriptDirectory) -> None:
    for place in project.locations(script):
        if place.is_ours or project.PACKAGE in place.written:
            raise MigrationError(
                "version_locations names this package already, and the two ways can't be combined",
                detail=f'Each revision would be there twice, once from "{place.written}".',
                hint=f"Take {project.LOCATION} out of version_locations, then run stubs again;"
                " or keep it without stubs.",
            )


def _directory(given: Path | None, script: ScriptDirectory | None) -> Path:
    if script is None:
        if given is None:
            raise UsageError(
                "there is neither an alembic.ini nor a [tool.alembic] in pyproject.toml here",
                hint="Run this in the host's folder, name its configuration with --config, or give --directory.",
            )
        known = []
    else:
        known = [place.path for place in project.locations(script) if place.path]
        if given is None and len(known) == 1:
            given = known[0]
    if given is None:
        raise UsageError(
            "the configuration has several version locations",
            hint="\n".join(f"--directory {_short(path)}" for path in known),
        )
    if not given.is_dir():
        raise UsageError(
            f'"{given}" is not a folder', hint="--directory is the folder that holds the host's revisions."
        )
    if script and not any(_looks_in(path, given, script.recursive_version_locations) for path in known):
        raise UsageError(
            f'Alembic looks for no revisions in "{given}"',
            hint="\n".join(f"--directory {_short(path)}" for path in known),
        )
    return given


def _looks_in(location: Path, folder: Path, recursive: bool) -> bool:
    location, folder = location.resolve(), folder.resolve()
    return folder == location or (recursive and folder.is_relative_to(location))


def _short(path: Path) -> Path:
    here, path = Path.cwd(), path.absolute()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _refuse_second_time(directory: Path, revisions: Sequence[str]) -> None:
    """By the text of each file: the history may be unreadable without what env.py puts on sys.path."""
    assignment = re.compile(rf"^revision\b[^=\n]*=\s*[\"']({'|'.join(revisions)})[\"']", re.MULTILINE)
    for file in sorted(directory.rglob("*.py")):
        if found := assignment.search(file.read_text(errors="replace")):
            raise MigrationError(
                f'revision "{found[1]}" is there already, in {_short(file)}',
                hint="For another table, write a revision of your own that calls openmemory_migrations.ops.",
            )


def _down_revision(given: str | None, script: ScriptDirectory) -> str | None:
    """The revision that ours follow; None for base."""
    try:
        project.revisions(script)
    except Exception as error:
        return _unverified(given, error)
    heads = script.get_heads()
    named = "The heads are: " + ", ".join(f'"{head}"' for head in heads) + "." if heads else "There are no revisions."
    if given is None:
        if len(heads) > 1:
            raise UsageError(
                f"the host's history has {len(heads)} heads",
                detail=named,
                hint="Merge them first, with alembic merge heads, or choose one with --down-revision.",
            )
        if heads:
            log.notice(f'the revisions follow "{heads[0]}", the only head')
        return heads[0] if heads else None
    if given.lower() in ("base", "none"):
        if heads:
            log.warning(
                "with base as down revision the history gets a second base and a second head",
                hint="alembic upgrade head then fails; the order on an empty database is not defined.",
            )
        return None
    if "," in given:
        raise UsageError("one down revision only", detail=named, hint="Merge the heads first: alembic merge heads")
    try:
        found = script.get_revision(given)
    except CommandError as error:
        raise UsageError(f'the host has no revision "{given}"', detail=named) from error
    if found.revision not in heads:
        raise UsageError(f'revision "{found.revision}" is not a head: others follow it already', detail=named)
    return found.revision


def _unverified(given: str | None, error: Exception) -> str | None:
    if given is None:
        raise UsageError(
            f"the host's history can't be read: {error}", hint="Name its head: --down-revision REVISION"
        ) from error
    log.warning(f"the host's history can't be read, so the down revision is not checked: {error}")
    return None if given.lower() in ("base", "none") else given


def _refuse_overwriting(stubs: list[Stub]) -> None:
    if len({stub.path for stub in stubs}) < len(stubs):
        raise MigrationError(
            f'file_template gives all files the name "{stubs[0].path.name}"',
            hint="Put %%(rev)s into file_template.",
        )
    for stub in stubs:
        if stub.path.exists():
            raise MigrationError(f"{_short(stub.path)} is there already", hint="Move it away; nothing was written.")


def _check_written(config: Config | None, revisions: Sequence[str]) -> None:
    """Raises MigrationError unless Alembic, asked anew, finds them."""
    if config is None:
        return
    script = project.script_directory(config)
    try:
        known = {one.revision for one in project.revisions(script)}
    except Exception:  # as unreadable as it was before
        return
    if missing := [revision for revision in revisions if revision not in known]:
        raise MigrationError(
            f'Alembic does not find the new revision "{missing[0]}"; nothing was written',
            detail=f'file_template is "{script.file_template}".',
            hint="With folders in file_template: recursive_version_locations = true",
        )


def _say_what_is_next(
    config: Config | None, parent: str | None, given: Mapping[str, Any], engine_name: str | None
) -> None:
    number = "a revision is" if "cutover" in given else "three revisions are"
    log.notice(
        f"{number} written, " + (f'after "{parent}"' if parent else "as a base of their own"),
        detail=(
            "What isn't given in them comes from -x and OM_*, such as OM_VEC_DIM."
            if given
            else "Schema, table and dimensions come from OM_PG_SCHEMA, OM_VECTOR_TABLE and OM_VEC_DIM."
        )
        + " Each step commits by itself, and the first with it what the same run has done before.",
        hint="Review and commit what is written, then: alembic upgrade head"
        "\nGive them no branch label: a downgrade by that label takes your own revisions with it."
        "\nFor alembic check and --autogenerate, in env.py: context.configure(…,"
        " include_object=openmemory_migrations.autogenerate.include_object)",
    )
    databases = project.option(config, "databases") if config else None
    if databases and engine_name is None:
        log.warning(
            f"env.py may run the revisions on several databases: {databases}",
            hint="If only one has the table: delete what is written, and run stubs with --engine-name NAME.",
        )


__all__ = ["arguments", "run"]
