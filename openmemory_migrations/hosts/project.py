"""A host application's Alembic set-up, read as the `alembic` command reads it. Runs no env.py, connects to nothing.

Alembic has no public way to ask for the files of a history or for the name of a new one: what is private here
(_load_revisions, _rev_path, _generate_create_date) is the same from 1.13.3 to 1.20.1.
"""

from __future__ import annotations

import argparse
import inspect
import os
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import alembic
from alembic.config import CommandLine, Config
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RevisionMap
from alembic.util import coerce_resource_to_filename

from ..errors import UsageError

PACKAGE = "openmemory_migrations"
LOCATION = f"{PACKAGE}:versions"
CUTOVER_LOCATION = f"{PACKAGE}:cutover/versions"
CUTOVER = "om_20240109_cutover"
EXPAND, BACKFILL, FINALIZE = "om_20240107_pgvector", "om_20240107_backfill", "om_20240108_finalize"
REVISIONS = (EXPAND, BACKFILL, FINALIZE)
KNOWS_TOML = "toml_file" in inspect.signature(Config).parameters  # and path_separator: both came with Alembic 1.16
SEPARATOR = "path_separator" if KNOWS_TOML else "version_path_separator"
ALEMBIC = f"Alembic {alembic.__version__}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the alembic command that say which configuration is meant."""
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="alembic.ini or pyproject.toml, or both; default: $ALEMBIC_CONFIG, else both in the current folder",
    )
    parser.add_argument("-n", "--name", default="alembic", help="section of the ini file; default: alembic")
    parser.add_argument("-x", action="append", default=[], metavar="NAME=VALUE", help="for env.py, as with alembic -x")


def configuration(options: argparse.Namespace) -> Config | None:
    """What `alembic current` would work with, or None where there is no configuration. Raises UsageError."""
    ini, toml = "alembic.ini", "pyproject.toml"
    given = options.config or [name for name in [os.environ.get("ALEMBIC_CONFIG")] if name]
    for name in given:
        if not Path(name).is_file():
            raise UsageError(f'"{name}" is not a file', hint="Name the host's alembic.ini or pyproject.toml.")
        if Path(name).name == "pyproject.toml":
            toml = name
        else:
            ini = name
    words = [word for name in options.config for word in ("-c", name)]
    words += [word for value in options.x for word in ("-x", value)]
    more: dict[str, Any] = {"toml_file": toml} if KNOWS_TOML else {}
    config = Config(
        ini,
        ini_section=options.name,
        cmd_opts=CommandLine().parser.parse_args([*words, "-n", options.name, "current"]),
        **more,
    )
    try:
        in_toml = KNOWS_TOML and bool(config.toml_alembic_config)
        return config if in_toml or config.file_config.has_section(options.name) else None
    except Exception as error:  # configparser's and tomllib's own
        raise UsageError(f"the configuration can't be read: {error}") from error


def option(config: Config, name: str) -> Any:
    """One option of the ini file, else of pyproject.toml, as it is written there but for %(here)s."""
    return config.get_alembic_option(name) if KNOWS_TOML else config.get_main_option(name)


def script_directory(config: Config) -> ScriptDirectory:
    """The host's script directory; what is on prepend_sys_path can be imported from then on. Raises UsageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ScriptDirectory.from_config(config)
    except Exception as error:
        hint = "alembic heads must run without an error first."
        if "separator" in str(error):  # up to 1.15 the template has a comment behind the value, which is no comment
            hint = f"{SEPARATOR} = space, with nothing behind it; then separate version_locations by spaces."
        raise UsageError(f"the configuration can't be used: {error}", hint=hint) from error


@dataclass(frozen=True)
class Location:
    """One of version_locations: as it is written, and where that leads; None if its package can't be imported."""

    written: str
    path: Path | None

    @property
    def found(self) -> bool:
        return self.path is not None and self.path.is_dir()

    @property
    def is_ours(self) -> bool:
        return self.path is not None and self.path.is_dir() and self.path.samefile(own_versions())


def own_versions() -> Path:
    return Path(str(resources.files(PACKAGE))) / "versions"


def locations(script: ScriptDirectory) -> list[Location]:
    written = [str(location) for location in script.version_locations or ()]
    return [Location(one, _resolve(one)) for one in written or [str(Path(script.dir) / "versions")]]


def _resolve(written: str) -> Path | None:
    try:
        return Path(coerce_resource_to_filename(written)).absolute()
    except (ImportError, TypeError, ValueError):
        return None


def revisions(script: ScriptDirectory) -> list[Script]:
    """Every revision file, duplicates too; `script` answers from these afterwards. Raises whatever a file raises."""
    places = locations(script)
    if any(place.path is None for place in places):  # Alembic itself would stop at the first of these
        script.version_locations = [str(place.path) for place in places if place.path is not None]
        if not script.version_locations:
            return []
    scripts = list(script._load_revisions())
    script.revision_map = RevisionMap(lambda: scripts)
    with warnings.catch_warnings():  # that a revision is present twice, or its down_revision missing
        warnings.simplefilter("ignore")
        script.get_heads()
    return scripts


__all__ = [
    "ALEMBIC",
    "BACKFILL",
    "CUTOVER",
    "CUTOVER_LOCATION",
    "EXPAND",
    "FINALIZE",
    "KNOWS_TOML",
    "LOCATION",
    "PACKAGE",
    "REVISIONS",
    "SEPARATOR",
    "Location",
    "arguments",
    "configuration",
    "locations",
    "option",
    "own_versions",
    "revisions",
    "script_directory",
]
