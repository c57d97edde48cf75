"""What each driver does in its own way: COPY in binary form, notices, cancel, process id.

One small class per driver, over the raw connection that SQLAlchemy holds (connection.connection.dbapi_connection). The
async drivers are called from SQLAlchemy's greenlet, and `run_async`, which is public there, takes their coroutines.
"""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from sqlalchemy.engine import Connection

from ..errors import MigrationError

BUFFER = 64 * 1024
ANSWER = 1.0  # seconds in which a host answers that is to cancel a statement
Heard = Callable[[str], None]


class Driver(Protocol):
    """`errors` are what its calls raise where SQLAlchemy doesn't see them."""

    errors: tuple[type[BaseException], ...]

    def __init__(self, raw: Any) -> None: ...
    @property
    def closed(self) -> bool: ...
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


class Psycopg2:
    def __init__(self, raw: Any) -> None:
        import psycopg2

        self.raw = raw
        self.errors: tuple[type[BaseException], ...] = (psycopg2.Error,)

    @property
    def closed(self) -> bool:
        return bool(self.raw.closed)

    @property
    def pid(self) -> int:
        return int(self.raw.get_backend_pid())

    def cancel(self) -> None:
        # it connects while it holds the interpreter's lock: never to a host that doesn't answer
        host, port = self.raw.info.host, self.raw.info.port
        if host and not host.startswith("/"):
            socket.create_connection((host, port), timeout=ANSWER).close()
        self.raw.cancel()

    def copy_out(self, query: str) -> memoryview:
        received = io.BytesIO()
        with self.raw.cursor() as cursor:
            cursor.copy_expert(f"COPY ({query}) TO STDOUT (FORMAT binary)", received, BUFFER)
        return received.getbuffer()

    def copy_in(self, table: str, data: bytes) -> None:
        with self.raw.cursor() as cursor:
            cursor.copy_expert(f'COPY pg_temp."{table}" FROM STDIN (FORMAT binary)', io.BytesIO(data), BUFFER)

    @contextmanager
    def notices(self, heard: Heard) -> Iterator[None]:
        # SQLAlchemy empties psycopg2's list after each statement, unread
        before, self.raw.notices = self.raw.notices, _Listener(heard)
        try:
            yield
        finally:
            self.raw.notices = before


class _Listener:
    def __init__(self, heard: Heard) -> None:
        self.append = heard


class Psycopg:
    """psycopg 3, and what its async form shares with it."""

    def __init__(self, raw: Any) -> None:
        import psycopg

        self.raw = raw
        self.own = raw.driver_connection if hasattr(raw, "driver_connection") else raw
        self.errors: tuple[type[BaseException], ...] = (psycopg.Error,)

    @property
    def closed(self) -> bool:
        return bool(self.own.closed)

    @property
    def pid(self) -> int:
        return int(self.own.info.backend_pid)

    def cancel(self) -> None:
        self.own.cancel()

    def copy_out(self, query: str) -> bytes:
        with self.own.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT binary)") as copy:
            return b"".join(copy)

    def copy_in(self, table: str, data: bytes) -> None:
        with self.own.cursor() as cursor, cursor.copy(f'COPY pg_temp."{table}" FROM STDIN (FORMAT binary)') as copy:
            copy.write(data)

    @contextmanager
    def notices(self, heard: Heard) -> Iterator[None]:
        def handler(diagnostic: Any) -> None:
            heard(_notice(diagnostic.severity, diagnostic.message_primary, diagnostic.message_detail))

        # prepared by itself after five runs, a statement is looked for on whatever server a pooler gives
        threshold, self.own.prepare_threshold = self.own.prepare_threshold, None
        self.own.add_notice_handler(handler)
        try:
            yield
        finally:
            self.own.remove_notice_handler(handler)
            self.own.prepare_threshold = threshold


class PsycopgAsync(Psycopg):
    def copy_out(self, query: str) -> bytes:
        async def copy(own: Any) -> bytes:
            async with own.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT binary)") as stream:
                return b"".join([chunk async for chunk in stream])

        return self.raw.run_async(copy)  # type: ignore[no-any-return]

    def copy_in(self, table: str, data: bytes) -> None:
        async def copy(own: Any) -> None:
            statement = f'COPY pg_temp."{table}" FROM STDIN (FORMAT binary)'
            async with own.cursor() as cursor, cursor.copy(statement) as stream:
                await stream.write(data)

        self.raw.run_async(copy)


class Asyncpg:
    def __init__(self, raw: Any) -> None:
        import asyncpg

        self.raw, self.own = raw, raw.driver_connection
        self.errors: tuple[type[BaseException], ...] = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
        self.loop = asyncio.get_running_loop()

    @property
    def closed(self) -> bool:
        return bool(self.own.is_closed())

    @property
    def pid(self) -> int:
        return int(self.own.get_server_pid())

    def cancel(self) -> None:
        # what asyncpg does itself when a task is cancelled
        self.loop.call_soon_threadsafe(lambda: self.own._cancel_current_command(self.loop.create_future()))

    def copy_out(self, query: str) -> memoryview:
        received = io.BytesIO()

        async def sink(chunk: bytes) -> None:
            received.write(chunk)

        self.raw.run_async(lambda own: own.copy_from_query(query, output=sink, format="binary"))
        return received.getbuffer()

    def copy_in(self, table: str, data: bytes) -> None:
        async def source() -> AsyncIterator[bytes]:  # bytes themselves would be taken for a path
            yield data

        self.raw.run_async(
            lambda own: own.copy_to_table(table, source=source(), schema_name="pg_temp", format="binary")
        )

    @contextmanager
    def notices(self, heard: Heard) -> Iterator[None]:
        def listener(_: Any, message: Any) -> None:
            heard(_notice(message.severity_en or message.severity, message.message, message.detail))

        self.own.add_log_listener(listener)
        try:
            yield
        finally:
            if not self.closed:
                self.raw.run_async(lambda _: asyncio.sleep(0))  # the last ones are on their way through the loop
                self.own.remove_log_listener(listener)


def _notice(severity: str | None, message: str | None, detail: str | None) -> str:
    return f"{severity}:  {message}" + (f"\nDETAIL:  {detail}" if detail else "")


DRIVERS: dict[tuple[str, bool], type[Driver]] = {
    ("psycopg2", False): Psycopg2,
    ("psycopg", False): Psycopg,
    ("psycopg", True): PsycopgAsync,
    ("asyncpg", True): Asyncpg,
}


def driver_of(connection: Connection) -> Driver:
    """The driver of an open connection. Raises MigrationError for one that isn't supported, by name."""
    dialect = connection.dialect
    found = DRIVERS.get((dialect.driver, dialect.is_async))
    if found is None:
        raise MigrationError(
            f'driver "{dialect.driver}" is not supported',
            hint="Use psycopg2, psycopg or asyncpg, as in postgresql+psycopg2://user:password@host/database.",
        )
    return found(connection.connection.dbapi_connection)
