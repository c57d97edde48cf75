"""A socket in front of the server's: a test sees each statement of a run before the server does, and can cut there."""

from __future__ import annotations

import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from openmemory_migrations import embedded
from tests.support.openmemory import Database

# what to do with a statement: pass it on (None), or cut every connection before or after passing it on
Verdict = Literal["before", "after"] | None
SOCKET = ".s.PGSQL.5432"


class Proxy:
    """Calls `watch` with each statement, in the thread of its connection; `statements` are all of them, in order."""

    def __init__(self, server: embedded.Server, folder: Path, watch: Callable[[str], Verdict]) -> None:
        self.statements: list[str] = []
        self._server, self._folder, self._watch = server, folder, watch
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / SOCKET))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def to(self, database: Database) -> Database:
        return Database(database.name, f"postgresql://postgres@/{database.name}?host={self._folder}")

    def cut(self) -> None:
        """Close every connection, as a network that fails does."""
        with self._lock:
            for end in self._sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                with self._lock:
                    self._sockets += [client, server]
                server.connect(str(self._server.socket_dir / SOCKET))
                for pump in (self._forward, self._back):
                    threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            for message in _messages(client):
                verdict = None
                if message[:1] == b"Q":
                    statement = message[5:-1].decode()
                    self.statements.append(statement)
                    verdict = self._watch(statement)
                if verdict != "before":
                    server.sendall(message)
                if verdict:
                    self.cut()
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _back(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(server: embedded.Server, watch: Callable[[str], Verdict] = lambda _: None) -> Iterator[Proxy]:
    folder = Path(tempfile.mkdtemp(prefix="om-proxy-"))
    proxy = Proxy(server, folder, watch)
    try:
        yield proxy
    finally:
        proxy.close()
        shutil.rmtree(folder, ignore_errors=True)


def _messages(client: socket.socket) -> Iterator[bytes]:
    """The frontend's messages, whole: https://www.postgresql.org/docs/current/protocol-message-formats.html."""
    buffer, head = b"", 4  # the first one has no type byte
    while data := client.recv(65536):
        buffer += data
        while len(buffer) >= head:
            (length,) = struct.unpack_from(">i", buffer, head - 4)
            size = length + head - 4
            if len(buffer) < size:
                break
            yield buffer[:size]
            buffer, head = buffer[size:], 5
