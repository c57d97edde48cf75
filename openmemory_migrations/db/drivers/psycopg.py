"""psycopg 3, sync and async."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .driver import LIBPQ, Heard, notice


class Psycopg:
    """And what its async form shares with it."""

    arguments: Mapping[str, str] = LIBPQ

    def __init__(self, raw: Any) -> None:
        import psycopg

        self.raw = raw
        self.own = raw.driver_connection if hasattr(raw, "driver_connection") else raw
        self.errors: tuple[type[BaseException], ...] = (psycopg.Error,)

    @property
    def closed(self) -> bool:
        return bool(self.own.closed)

    @property
    def autocommit(self) -> bool:
        return bool(self.raw.autocommit)

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
            heard(notice(diagnostic.severity, diagnostic.message_primary, diagnostic.message_detail))

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

        return self.raw.run_async(copy)  # type: ignore[no-any-return]  # SQLAlchemy gives it no type

    def copy_in(self, table: str, data: bytes) -> None:
        async def copy(own: Any) -> None:
            statement = f'COPY pg_temp."{table}" FROM STDIN (FORMAT binary)'
            async with own.cursor() as cursor, cursor.copy(statement) as stream:
                await stream.write(data)

        self.raw.run_async(copy)


DRIVERS = {("psycopg", False): Psycopg, ("psycopg", True): PsycopgAsync}
