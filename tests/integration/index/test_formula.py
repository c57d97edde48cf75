"""How an index is built is one rule, whether Python computes by it or, in a script, the server."""

from __future__ import annotations

from openmemory_migrations.index import choice
from openmemory_migrations.index.formula import Formula
from tests.support.openmemory import Database

ROWS = (0, 1, 49, 50, 99, 1000, 1001, 49_999, 999_999, 1_000_000, 1_000_001, 1_000_999, 123_456_789, 10**9)
LISTS = (1, 2, 199, 200, 201, 1000, 32_768)


def test_the_server_has_as_many_lists_as_python(database: Database) -> None:
    found = database.rows(
        f"SELECT rows, {choice.lists_for(Formula('rows'))} FROM unnest(%s::bigint[]) AS rows", list(ROWS)
    )

    assert found == [(rows, choice.lists_for(rows)) for rows in ROWS]
    assert dict(found)[49] == 0
    assert dict(found)[1_000_001] == 1000


def test_the_server_has_as_much_memory_as_python(database: Database) -> None:
    rows, lists = Formula("rows"), Formula("lists")
    for dimensions, half in ((1, False), (256, False), (4000, True)):
        item = choice.item_size(dimensions, half)
        formulas = (choice.ivfflat_memory(lists, dimensions, item, rows), choice.hnsw_memory(rows, 16, item))
        wanted = ", ".join(str(choice.kilobytes(formula)) for formula in formulas)
        found = database.rows(
            f"SELECT rows, lists, {wanted} FROM unnest(%s::bigint[]) AS rows, unnest(%s::bigint[]) AS lists",
            *(list(ROWS), list(LISTS)),
        )
        assert len(found) == len(ROWS) * len(LISTS)
        for number, of, ivfflat, hnsw in found:
            assert ivfflat == choice.kilobytes(choice.ivfflat_memory(of, dimensions, item, number))
            assert hnsw == choice.kilobytes(choice.hnsw_memory(number, 16, item))
