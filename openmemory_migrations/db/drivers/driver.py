"""What every driver can: COPY in binary form, notices, cancel, process id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

Heard = Callable[[str], None]

# A lock's connection is idle for hours, and what stands between forgets idle connections within minutes. A network that
# swallows everything is a lost connection after a minute, whichever side is to speak next
LIBPQ = {
    # whatever the role or database has: all keys can be read then, of SQL_ASCII those that are UTF-8
    "client_encoding": "utf8",
    "connect_timeout": "15",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


class Driver(Protocol):
    """`errors` are what its calls raise where SQLAlchemy doesn't see them, `arguments` what a connection of ours is
    made with."""

    arguments: Mapping[str, str]
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
