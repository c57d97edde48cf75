"""`verify --sample`: a part of the rows, evenly spread, none of them twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.openmemory import TABLE
from openmemory_migrations.backfill.reader import Window
from openmemory_migrations.db.partitions import Part
from openmemory_migrations.verify.equality import MOST_WINDOWS, spread
from tests.support.commands import om
from tests.support.openmemory import Database
from tests.support.verification import DIM, ROWS, UNSEARCHED, compared, key, set_both, table, verify

__all__ = ["table"]  # a fixture

ROW, OTHER = ROWS[0], ROWS[1234]


def windows_of(sizes: list[int]) -> list[Window]:
    parts = [Part(oid, None, "public", f"part{oid}", "r", "", True, False) for oid in range(len(sizes))]
    return [Window(part, 0, size) for part, size in zip(parts, sizes, strict=True)]


@given(
    st.lists(st.integers(0, 300) | st.integers(0, 10**7), min_size=1, max_size=5).filter(any),
    st.integers(1, 300) | st.integers(1, 10**7),
)
def test_places_are_spread_evenly_and_no_page_is_taken_twice(sizes: list[int], pages: int) -> None:
    whole = windows_of(sizes)
    pages = min(pages, sum(sizes))

    chosen = spread(whole, pages)

    last = (0, 0)
    for window in chosen:
        assert last <= (window.part.oid, window.first)
        assert window.first < window.end <= whole[window.part.oid].end
        last = (window.part.oid, window.end)
    taken = sum(window.end - window.first for window in chosen)
    # a place more at most in each part, and where nearly everything is taken, nearly everything
    assert pages - MOST_WINDOWS <= taken <= pages + len(sizes) * -(-pages // MOST_WINDOWS)
    assert len(chosen) <= MOST_WINDOWS + len(sizes)
    assert {window.part.oid for window in chosen} == {oid for oid, size in enumerate(sizes) if size}


@pytest.mark.slow
def test_a_sample_looks_at_a_part_and_says_so(table: Database) -> None:
    found, _ = compared(table, 0, "--sample", "500")

    assert found["sampled"] is True
    assert 250 <= found["rows"] == found["equal"] <= 1500
    text = om(table, "verify", *UNSEARCHED, "--sample", "500").stdout
    assert f"{found['rows']:,} looked at, a sample;" in text


@pytest.mark.slow
def test_a_sample_finds_what_is_wrong_in_it(table: Database) -> None:
    set_both(table, OTHER, ROW.v or b"", OTHER.v or b"")
    found, wrong = compared(table, 1, "--sample", str(len(ROWS)))
    assert wrong == {"differs": [key(OTHER)]}
    assert (found["rows"], found["sampled"]) == (len(ROWS), False)

    table.run(f"UPDATE {TABLE} SET v_vector = %s", str([1.5] * DIM))
    found = verify(table, 1, *UNSEARCHED, "--sample", "500")["comparison"]
    assert found["wrong"][0]["rows"] == found["rows"] >= 250
    assert found["equal"] == 0


@pytest.mark.slow
def test_what_is_searched_is_the_whole_though_a_sample_is_compared(table: Database) -> None:
    whole, part = (verify(table, 0, "--queries", "20", *more)["search"] for more in ([], ["--sample", "100"]))

    assert part["session"]["recall"] == whole["session"]["recall"]
    assert part["every_row"]["recall"] == whole["every_row"]["recall"] == 1
