"""Which of the server's errors are about a row, that is passed by, and which about all of them."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from openmemory_migrations.backfill.passes import is_a_rows


class Refused(Exception):
    def __init__(self, state: str) -> None:
        super().__init__("refused")
        self.sqlstate = state


@pytest.mark.parametrize(
    ("state", "of_a_row"),
    [
        ("23514", True),  # check_violation
        ("22003", True),  # numeric_value_out_of_range
        ("XX001", True),  # data_corrupted
        ("58030", True),  # io_error: a page that can't be read
        ("58P01", False),  # undefined_file: a library that can't be loaded
        ("53100", False),  # disk_full
        ("42501", False),  # insufficient_privilege
        ("57014", False),  # query_canceled
    ],
)
def test_an_error_is_of_a_row_or_of_the_server(state: str, of_a_row: bool) -> None:
    assert is_a_rows(DBAPIError("UPDATE", None, Refused(state))) is of_a_row
