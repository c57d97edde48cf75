"""psycopg2."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .driver import LIBPQ, Heard

BUFFER = 64 * 1024
ANSWER = 1.0  # seconds in which a host answers that is to cancel a statement


class Psycopg2:
    arguments: Mapping[str, str] = LIBPQ

    def __init__(self, raw: Any) -> None:
        import psycopg2

        self.raw = raw
        self.errors: tuple[type[BaseException], ...] = (psycopg2.Error,)

    @property
    def closed(self) -> bool:
        return bool(self.raw.closed)

    @property
    def autocommit(self) -> bool:
        return bool(self.raw.autocommit)

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


DRIVERS = {("psycopg2", False): Psycopg2}
