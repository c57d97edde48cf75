"""For a host's env.py: keeps autogenerate and `alembic check` from proposing to drop what this package has made.

    from openmemory_migrations import autogenerate

    context.configure(..., include_object=autogenerate.include_object)

Beside a function of the host's own, an object stays if both say so:

    def include_object(*args):
        return mine(*args) and autogenerate.include_object(*args)

Only what the database has and the host's models haven't is hidden; what is mapped is compared as ever. Triggers and
functions are nothing that autogenerate looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alembic import context

from .marks import CUT_OVER, GIVEN, OWN, TYPED
from .settings import Settings
from .target import CUTOVER_VERSION_TABLE, VERSION_TABLE, Target

# environment's, which this module must not load: it brings numpy along

MARKS = (OWN, CUT_OVER, GIVEN, TYPED)  # of columns

IncludeObject = Callable[[Any, "str | None", str, bool, Any], bool]


def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """False for what is ours around OpenMemory's table, as -x and OM_* name it, and for the table itself.

    Raises MigrationError for a wrong value of theirs.
    """
    target = Target.of(Settings.load(_arguments()))
    if _unmapped(reflected, compare_to) and type_ == "table" and _is(object, target):
        return False
    return _shown(target, object, name, type_, reflected, compare_to)


def hiding(
    *, schema: str | None = None, table: str, column: str = "v", vector_column: str = "v_vector"
) -> IncludeObject:
    """An include_object for another table that ops have migrated, which is the host's own and therefore not hidden.

    Without `schema` the table is meant in whichever schema it is found.
    """
    target = Target(schema or "", table, column, vector_column)

    def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
        return _shown(target, object, name, type_, reflected, compare_to)

    return include_object


def _shown(target: Target, object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    if type_ == "table":
        return not (_unmapped(reflected, compare_to) and name in (VERSION_TABLE, CUTOVER_VERSION_TABLE, target.kept))
    if type_ == "column":
        beside = name in (target.vector, target.adopted, target.archive, target.typed)
        ours = beside and _is(object.table, target)
        marked = compare_to is not None and (compare_to.comment or "").startswith(MARKS)
        if marked and (beside or name == target.source) and _is(object.table, target):
            # the database's, which marks the column as made here: taken away, it would be set aside as somebody else's
            compare_to.comment = object.comment
        return not (ours and _unmapped(reflected, compare_to))
    if type_ == "index":
        ours = name in (*target.indexes, *target.native.indexes) and _is(object.table, target)
        # nor is it proposed where it is mapped and missing: the steps build it CONCURRENTLY, as soon as it can be had
        return not (ours and compare_to is None)
    return True


def _unmapped(reflected: bool, compare_to: Any) -> bool:
    return reflected and compare_to is None


def _is(table: Any, target: Target) -> bool:
    # Alembic has no schema for tables of the connection's default schema, whatever that is called
    return table.name == target.table and (not target.schema or table.schema in (None, target.schema))


def _arguments() -> dict[str, str]:
    """The -x arguments, where Alembic runs with an environment."""
    try:
        return context.get_x_argument(as_dictionary=True)
    except NameError:
        return {}


__all__ = ["IncludeObject", "hiding", "include_object"]
