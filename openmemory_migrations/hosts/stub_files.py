"""The text and the names of the files that `stubs` writes."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory

from ..errors import MigrationError
from .project import BACKFILL, CUTOVER, EXPAND, FINALIZE

# step, revision id, what it does; the message, for the file's name, is `openmemory <step>`
STEPS = (
    ("expand", EXPAND, "extension, vector column, sync trigger"),
    ("backfill", BACKFILL, "the bytes into the vector column, in batches"),
    ("finalize", FINALIZE, "checks, index, advice"),
)
LAST_STEP = (("cutover", CUTOVER, "one column of vectors, and the way back"),)
WIDTH = 88  # of a line, where the host's formatter is black or ruff with its defaults

TEMPLATE = '''"""openmemory {step}: {title}

Revision ID: {revision}
Revises: {parent}

"""

from openmemory_migrations import ops

revision = "{revision}"
down_revision = {down_revision}
branch_labels = None
depends_on = None


def upgrade(**kw: object) -> None:
{upgrade}


def downgrade(**kw: object) -> None:
{downgrade}
'''


@dataclass(frozen=True)
class Stub:
    path: Path
    text: str


def steps(given: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """The first three, or the last one by itself where it is said what that is to do."""
    return LAST_STEP if "cutover" in given else STEPS


def stubs(
    script: ScriptDirectory, directory: Path, parent: str | None, given: Mapping[str, Any], engine_name: str | None
) -> Iterator[Stub]:
    # a minute apart, or a file_template that is a time only would name them all alike
    now = script._generate_create_date()
    wanted = steps(given)
    for number, (step, revision, title) in enumerate(wanted, 1):
        date = now - datetime.timedelta(minutes=len(wanted) - number)
        path = Path(script._rev_path(str(directory), revision, f"openmemory {step}", date))
        text = TEMPLATE.format(
            step=step,
            title=title,
            revision=revision,
            parent=parent or "",
            down_revision=json.dumps(parent) if parent else None,
            upgrade=_call(f"upgrade_{step}", given, engine_name),
            downgrade=_call(f"downgrade_{step}", given, engine_name),
        )
        yield Stub(path, text.replace("Revises: \n", "Revises:\n"))
        parent = revision


def _call(function: str, given: Mapping[str, Any], engine_name: str | None) -> str:
    """The function's body, as black and ruff would format it."""
    arguments = [f"{name}={_literal(value)}" for name, value in given.items()]
    indent, lines = "    ", []
    if engine_name is not None:
        lines.append(f'{indent}if kw.get("engine_name") == {_literal(engine_name)}:')
        indent *= 2
    one = f"{indent}ops.{function}({', '.join(arguments)})"
    if len(one) <= WIDTH:
        return "\n".join([*lines, one])
    return "\n".join([*lines, f"{indent}ops.{function}(", *(f"{indent}    {one}," for one in arguments), f"{indent})"])


def _literal(value: Any) -> str:
    # a JSON string is a Python string, in the quotes that formatters want
    plain = isinstance(value, str) and '"' not in value
    return json.dumps(value, ensure_ascii=False) if plain else repr(value)


def write(stubs: list[Stub], check: Callable[[], None]) -> None:
    """Writes all files, or leaves none behind."""
    written: list[Path] = []
    try:
        for stub in stubs:
            for folder in reversed(stub.path.parents):  # a file_template may have folders
                if not folder.exists():
                    folder.mkdir()
                    written.append(folder)
            with open(stub.path, "x", encoding="utf-8") as file:
                written.append(stub.path)
                file.write(stub.text)
        check()
    except BaseException as error:
        for path in reversed(written):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, OSError):
            raise MigrationError(f"the files can't be written: {error}") from error
        raise


__all__ = ["Stub", "steps", "stubs", "write"]
