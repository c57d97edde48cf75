"""Findings about version_locations, and about the history of revisions that they lead to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from alembic.config import Config
from alembic.script import Script, ScriptDirectory

from ..finding import Finding
from . import project
from .probe import Seen
from .project import ALEMBIC, EXPAND, FINALIZE, LOCATION, PACKAGE, REVISIONS, Location


def places(config: Config, script: ScriptDirectory, found: list[Location]) -> Iterator[Finding]:
    written = str(project.option(config, "version_locations") or "")
    lost = [place for place in found if not place.found]
    if lost and re.search(rf"{LOCATION}\b", written) and not any(place.is_ours for place in found):
        yield _split(config, script, written)
        return
    for place in lost:
        package = place.written.partition(":")[0]
        ours = PACKAGE[:8] in place.written
        if place.path is None:
            yield Finding(
                "error",
                "location-package",
                f'version location "{place.written}" is in a package "{package}" that is not installed',
                "Every alembic command fails with ModuleNotFoundError.",
                _lines(config, _instead(found, place))
                if ours
                else f"pip install {package}, or correct version_locations.",
            )
        elif ours or script.version_locations:
            yield Finding(
                "error",
                "location-missing",
                f'version location "{place.written}" is not there',
                f"Alembic says nothing about that, and finds no revisions in {place.path}.",
                _lines(config, _instead(found, place)) if ours else "Correct it, or take it out of version_locations.",
            )
    own = Path(script.dir).absolute() / "versions"
    listed = [place.path.resolve() for place in found if place.path]
    if own.resolve() not in listed and any(own.glob("*.py")):
        yield Finding(
            "error",
            "location-unlisted",
            f"version_locations does not list the host's own folder, {own}",
            "Setting version_locations replaces the default, so that the host's own revisions are not seen.",
            _lines(config, [str(own), *(place.written for place in found)]),
        )


def _instead(found: list[Location], wrong: Location) -> list[str]:
    return [LOCATION if place is wrong else place.written for place in found]


def _split(config: Config, script: ScriptDirectory, written: str) -> Finding:
    """Our location is written down, yet the separator in force makes something else of it."""
    keys = ("path_separator", "version_path_separator") if project.KNOWS_TOML else ("version_path_separator",)
    key = next((key for key in keys if project.option(config, key)), None)
    ignored = None if project.KNOWS_TOML else project.option(config, "path_separator")
    said = f"{key} = {project.option(config, key)}" if key else "no separator"
    # what was meant: our location is known, and whatever else is left was separated by one of these
    here = _here(config)  # may have spaces of its own
    rest = written.replace(LOCATION, " ").replace(here, "\0")
    meant = [one.replace("\0", here) for one in re.split(rf"[\s;,{os.pathsep}]+", rest) if one]
    return Finding(
        "error",
        "location-split",
        f'with {said}, version_locations leads nowhere near "{LOCATION}"',
        f"Alembic looks in {', '.join(repr(str(one)) for one in script.version_locations or ())}"
        " and says nothing about what isn't there."
        + (f" {ALEMBIC} does not know path_separator = {ignored}; 1.16 is the first." if ignored else ""),
        _lines(config, [*meant, LOCATION]),
    )


def _lines(config: Config, locations: list[str]) -> str:
    """The lines of the configuration that list these locations, with a separator that works."""
    section = config.config_ini_section
    in_toml = project.KNOWS_TOML and config.toml_alembic_config
    spaced = any(" " in one for one in locations)  # %(here)s is put in before the value is split
    locations = [one.replace("%", "%%").replace(_here(config), "%(here)s") for one in dict.fromkeys(locations)]
    if in_toml and not config.file_config.has_option(section, "version_locations"):
        return f"In pyproject.toml, [tool.alembic]:\nversion_locations = {json.dumps(locations)}"
    if spaced:
        return f"In [{section}]:\n{project.SEPARATOR} = newline\nversion_locations =" + "".join(
            f"\n    {one}" for one in locations
        )
    return f"In [{section}]:\n{project.SEPARATOR} = space\nversion_locations = {' '.join(locations)}"


def _here(config: Config) -> str:
    return str(Path(config.config_file_name or "").absolute().parent)


# -- history


def unreadable(error: Exception) -> Finding:
    return Finding(
        "error",
        "history-unreadable",
        f"the history of revisions can't be read: {type(error).__name__}: {error}",
        "Every alembic command stops there.",
        "alembic history shows where; a file that names a missing down_revision or depends_on gives a KeyError.",
    )


def revisions(script: ScriptDirectory, scripts: list[Script], *, blamed: bool) -> Iterator[Finding]:
    """`blamed` if the locations explain already why something isn't there."""
    paths: dict[str, list[str]] = {}
    for one in scripts:
        paths.setdefault(one.revision, []).append(str(one.path))
    twice = [revision for revision, where in paths.items() if len(where) > 1]
    if twice:
        ours = any(revision in REVISIONS for revision in twice)
        yield Finding(
            "error",
            "revision-twice",
            f'revision "{twice[0]}" is there twice' + (f", and {len(twice) - 1} more" if len(twice) > 1 else ""),
            f"In {' and in '.join(paths[twice[0]])}. Alembic only warns, and then finds heads that are none.",
            f"Stubs and {LOCATION} can't be combined: take it out of version_locations, or delete the stubs."
            if ours
            else "Delete one of the files.",
        )
    missing = [revision for revision in REVISIONS if revision not in paths]
    if len(missing) == len(REVISIONS) and not blamed and not any(map(_calls_ops, scripts)):
        yield Finding(
            "error",
            "not-reachable",
            "this history has no revision of openmemory_migrations",
            "Neither stubs nor the location is there, so alembic upgrade does nothing for the vectors.",
            "openmemory-migrations stubs" + _stub_arguments(script),
        )
    elif missing and len(missing) < len(REVISIONS):
        yield Finding(
            "error",
            "partly-reachable",
            f'revision "{missing[0]}" is missing beside the others of this package',
            hint="Restore its file from version control, or delete the others and run openmemory-migrations stubs.",
        )
    if len(script.get_heads()) > 1 and not twice:
        yield _heads(script, paths)
    if labelled := [one for one in scripts if one.revision in REVISIONS and getattr(one.module, "branch_labels", None)]:
        yield Finding(
            "warning",
            "branch-label",
            f'revision "{labelled[0].revision}" has a branch label',
            "A label is inherited by what follows and, in a linear history, a downgrade to <label>@base runs the"
            " downgrades of your own revisions as well.",
            f"branch_labels = None in {labelled[0].path}",
        )


def _calls_ops(script: Script) -> bool:
    """Whether a revision of the host's own imports something of ours."""
    names = (getattr(one, "__module__", None) or getattr(one, "__name__", "") for one in vars(script.module).values())
    return any(str(name).startswith(PACKAGE) for name in names)


def asks_for_engine(script: Script) -> bool:
    """Whether a revision of this package's looks at the name that the multidb template gives it."""
    return script.revision in REVISIONS and "engine_name" in Path(str(script.path)).read_text()


def _stub_arguments(script: ScriptDirectory) -> str:
    heads = script.get_heads()
    place = next((place.path for place in project.locations(script) if place.path), None)
    where = f" --directory {os.path.relpath(place)}" if place else ""
    return f"{where} --down-revision {heads[0] if len(heads) == 1 else '<your head>' if heads else 'base'}"


def _heads(script: ScriptDirectory, paths: dict[str, list[str]]) -> Finding:
    heads = script.get_heads()
    detail = 'alembic upgrade head fails with "Multiple head revisions"; alembic upgrade heads takes all.'
    hint = 'alembic merge heads -m "one history"'
    if EXPAND in paths and EXPAND in script.get_bases() and len(script.get_bases()) > 1:
        detail += (
            f' On an empty database the order of the two is not defined, and "{EXPAND}" may come before the revision'
            " that creates the table: then it stops with an error."
        )
        host = next((head for head in heads if head != FINALIZE), "<your head>")
        hint = (
            f"alembic upgrade {host} && alembic upgrade {FINALIZE}"
            "\nOr one history: take the location out, and openmemory-migrations stubs."
        )
    return Finding("warning", "several-heads", f"the history has {len(heads)} heads: {', '.join(heads)}", detail, hint)


def version_table(seen: Seen, scripts: list[Script] | None) -> Iterator[Finding]:
    if scripts is None:
        return
    known = {one.revision for one in scripts}
    strange = [head for head in seen.heads if head not in known]
    if not strange:
        return
    ours = any(head in REVISIONS for head in strange)
    yield Finding(
        "error",
        "version-table-shared",
        f'version table "{seen.version_table}" has "{strange[0]}", which this history does not know',
        'Every alembic command stops there with "Can\'t locate revision". '
        + (
            "It is this package's: the stubs, or the location, were there when the database was migrated."
            if ours
            else "Another project keeps its versions in the same table, or a file of this history is gone."
        ),
        "Restore the three files, or the location."
        if ours
        else 'context.configure(…, version_table="NAME_alembic_version") in one of the two, and its rows moved there',
    )


__all__ = ["asks_for_engine", "places", "revisions", "unreadable", "version_table"]
