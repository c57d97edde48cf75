"""SQL as text: the named blocks of the .sql files beside this one, and the one way for anything else to get into it.

A field is `{name}`, for what is SQL already, or a number; `{name|ident}` and `{name|literal}` quote a string. What they
make of it means the same under every setting of the server. A value of a row is in no text: it is bound.

A file holds blocks, each below its name, `-- name --`, and the comments that say why, which aren't sent. `{>name}` is
another block of the same file, `{>file.name}` one of another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files

from sqlalchemy.dialects import postgresql

# a paramstyle without percent signs, or the preparer would double those of an identifier; SQLAlchemy has not given the
# constructor types
_preparer = postgresql.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]

FIELD = re.compile(r"\{([a-z_]+)(?:\|([a-z]+))?\}")
BLOCK = re.compile(r"^-- ([a-z_]+) --\n", re.MULTILINE)
PART = re.compile(r"\{>(?:([a-z]+)\.)?([a-z_]+)\}")


class SQL(str):
    """Text that is SQL: quoted, or filled in by this module."""

    __slots__ = ()


class Argument(SQL):
    """Of the server's format(): it is to be filled in by a script, when that runs."""

    __slots__ = ()


Fragment = SQL | int


def quote(*identifiers: str) -> SQL:
    """An identifier, or one below the other (schema, table): always in double quotes, whatever quote_all_identifiers is
    and whichever key words the server has."""
    return SQL(".".join(map(_preparer.quote_identifier, identifiers)))


def unquote(name: str) -> str:
    """What `quote` has made of a name."""
    return name[1:-1].replace('""', '"')


def literal(text: str) -> SQL:
    """A string constant, for the few statements that take no parameters (COMMENT ON, a function's body).

    E'' wherever there is a backslash: what that means in '' depends on standard_conforming_strings, and \\' on
    backslash_quote.
    """
    doubled = text.replace("'", "''")
    escaped = doubled.replace("\\", "\\\\")
    return SQL(f"'{doubled}'" if doubled == escaped else f"E'{escaped}'")


def dollar_quote(inside: Iterable[object]) -> SQL:
    """What quotes a script's block, where nothing that is `inside` ends it."""
    found = "$script$"
    while any(found in str(text) for text in inside):
        found = f"{found[:-1]}_$"
    return SQL(found)


# quotes the body of a function, in which there are names, some of them known to the server only: longer than a name can
# be, it is in none
FUNCTION = SQL("$function" + 56 * "_" + "$")
FILTERS: dict[str, Callable[[str], SQL]] = {"ident": quote, "literal": literal}


def bound(text: str) -> str:
    """For a text whose `:names` are parameters: a colon inside a quoted name is none."""
    return text.replace(":", r"\:")


def formatted(text: str) -> str:
    """For a text that the server's format() gets."""
    return text.replace("%", "%%")


def fill(template: str, names: Mapping[str, object], escape: Callable[[str], str] = str) -> SQL:
    """The template with its fields filled in, each once: what stands in braces in a name is no field.

    Raises TypeError for a string that nobody has quoted.
    """

    def field(found: re.Match[str]) -> str:
        name, how = found.groups()
        value = names[name]
        if how:
            return escape(FILTERS[how](str(value)))
        if not isinstance(value, (SQL, int)):
            raise TypeError(f"{{{name}}} is neither SQL nor a number: {value!r}")
        if isinstance(value, Argument):
            return str(value)
        return escape(str(value).lower() if isinstance(value, bool) else str(value))

    return SQL(FIELD.sub(field, template))


def joined(separator: str, parts: Iterable[SQL]) -> SQL:
    return SQL(separator.join(parts))


class Blocks:
    """The blocks of a file, as attributes."""

    def __init__(self, file: str) -> None:
        text = (files(__package__) / f"{file}.sql").read_text(encoding="utf-8")
        _, *found = BLOCK.split(text)
        self._blocks: dict[str, str] = {}
        for name, block in zip(found[::2], found[1::2], strict=True):
            # comments inside a block are indented: those of a script are printed with it
            self._blocks[name] = "\n".join(line for line in block.splitlines() if not line.startswith("--")).strip()

    def __getattr__(self, name: str) -> str:
        try:
            block = self._blocks[name]
        except KeyError:
            raise AttributeError(name) from None
        return PART.sub(lambda part: getattr(blocks(part[1]) if part[1] else self, part[2]), block)


@cache
def blocks(file: str) -> Blocks:
    return Blocks(file)
