"""asyncpg."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .driver import Heard, notice


class Asyncpg:
    arguments: Mapping[str, str] = {}  # only a host's own connection is one of it

    def __init__(self, raw: Any) -> None:
        import asyncpg

        self.raw, self.own = raw, raw.driver_connection
        self.errors: tuple[type[BaseException], ...] = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
        self.loop = asyncio.get_running_loop()

    @property
    def closed(self) -> bool:
        return bool(self.own.is_closed())

    @property
    def autocommit(self) -> bool:
        return bool(self.raw.autocommit)

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
            heard(notice(message.severity_en or message.severity, message.message, message.detail))

        self.own.add_log_listener(listener)
        try:
            yield
        finally:
            if not self.closed:
                self.raw.run_async(lambda _: asyncio.sleep(0))  # the last ones are on their way through the loop
                self.own.remove_log_listener(listener)


DRIVERS = {("asyncpg", True): Asyncpg}
