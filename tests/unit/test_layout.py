"""A stranger finds a file by the tree alone: imports go down, the outside stays, and the map has every module."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import openmemory_migrations
from tests.support.commands import ROOT

PACKAGE = Path(openmemory_migrations.__file__).parent
# from above down; what is on one line may import each other
LAYERS = [
    ("__main__", "packaged", "versions", "cutover.versions"),
    ("cli",),
    ("hosts",),
    ("ops", "environment", "models", "autogenerate"),
    ("runtime",),
    ("preflight",),
    ("script",),
    ("cutover",),
    ("steps",),
    ("verify",),
    ("backfill",),
    ("index",),
    ("columns",),
    ("encoding",),
    ("db",),
    ("", "settings", "target", "marks", "errors", "finding", "log", "console", "embedded"),
    ("sql",),
]
PUBLIC = {
    "ops": [
        *("upgrade_expand", "upgrade_backfill", "upgrade_finalize", "upgrade_cutover"),
        *("downgrade_expand", "downgrade_backfill", "downgrade_finalize", "downgrade_cutover"),
        "repair",
        "Options",
    ],
    "settings": ["Settings"],
    "models": ["vectors_table"],
    "autogenerate": ["include_object"],
    "environment": ["run"],
    "embedded": ["temporary", "Server"],
    "errors": ["MigrationError", "TryAgain", "UsageError"],
    "cli": ["main"],
}
MOST_OUTSIDE = 14


def modules() -> dict[str, Path]:
    """Every module by its dotted name within the package; a folder's `__init__` by the folder's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    known = modules()
    package = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                above = package[: len(package) - node.level + 1]
                of = ".".join([*above, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == PACKAGE.name:
                of = (node.module or "").partition(".")[2]
            else:
                continue
            for alias in node.names:
                whole = f"{of}.{alias.name}".strip(".")
                yield whole if whole in known else of


def layer(name: str) -> int:
    for number, layer in enumerate(LAYERS):
        if any(name == part or (part and name.startswith(part + ".")) for part in layer):
            return number
    raise AssertionError(f"{name} is in no layer")


def test_imports_go_down_only() -> None:
    found = modules()
    arrows = [(name, other) for name, path in found.items() for other in imported(name, path)]
    assert len(arrows) > 500

    up = [f"{name} -> {other}" for name, other in arrows if layer(other) < layer(name)]

    assert up == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {other for other in imported(name, path) if other != name} for name, path in modules().items()}
    while leaves := [name for name, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: others - set(leaves) for name, others in graph.items()}
    assert graph == {}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_outside_stays_where_it_is(module: str) -> None:
    found = importlib.import_module(f"openmemory_migrations.{module}")

    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


def test_outside_are_few() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_OUTSIDE


def test_the_map_has_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    mapped = re.findall(r"^\| `([a-z0-9_/]+)\.py` \|", text, re.MULTILINE)
    there = {
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in modules().values()
        if not path.name.startswith("__") and "versions" not in path.parts and "packaged" not in path.parts
    }

    assert len(mapped) == len(set(mapped))
    assert set(mapped) == there
    named = set(re.findall(r"`([a-z_]+/[a-z_]+)\.py`", text))
    assert {name for name in named if not name.startswith(("tests/", "bench/"))} <= there


def test_what_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([a-z_/.]+(?:\.py|\.toml|/))`", text))

    assert len(named) > 15
    assert {path for path in named if not (ROOT / path).exists() and not (PACKAGE / path).exists()} == set()
