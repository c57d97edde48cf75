"""What every driver can: COPY in binary form, notices, cancel, process id."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

Heard = Callable[[str], None]


class Driver(Protocol):
    """`errors` are what its calls raise where SQLAlchemy doesn't see them."""

    errors: tuple[type[BaseException], ...]

    def __init__(self, raw: Any) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def autocommit(self) -> bool:
        """Whether the host has each statement committed by itself."""

    @property
    def pid(self) -> int:
        """The server process as the other side of the connection names it; a pooler names another."""

    def cancel(self) -> None:
        """Cancels the statement that runs; called from another thread."""

    def copy_out(self, query: str) -> bytes | memoryview:
        """What COPY of the query gives, whole."""

    def copy_in(self, table: str, data: bytes) -> None:
        """COPY into the temporary table of that name, unquoted."""

    def notices(self, heard: Heard) -> AbstractContextManager[None]:
        """Calls `heard` with each notice of the server while it lasts."""


def notice(severity: str | None, message: str | None, detail: str | None) -> str:
    return f"{severity}:  {message}" + (f"\nDETAIL:  {detail}" if detail else "")
