"""A real terminal, the kernel's, and commands that run on it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TextIO

from demo.openmemory import environment
from tests.support import forkserver
from tests.support.commands import NOTHING, ROOT, Process, Result, result
from tests.support.openmemory import Database

COLUMNS = 120
ALEMBIC, OURS = "alembic.config", "openmemory_migrations.cli"  # whose main() is run


class Terminal:
    """What is written to `stream`, and what of that is to be seen in the end."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.stream: TextIO = os.fdopen(slave, "w")
        self._bytes = b""
        self._gone = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # nobody has it open any more
            while not self._gone.is_set():
                if select.select([self._master], [], [], 0.05)[0]:
                    self._bytes += os.read(self._master, 65536)
        os.close(self._master)

    def end(self) -> None:
        """From here on nothing is written to it, and all that was has been read."""
        self.stream.close()
        self._reader.join(30)

    def hang_up(self) -> None:
        """What a lost ssh connection does: who writes to it gets an error."""
        self._gone.set()
        self._reader.join(30)

    @property
    def written(self) -> str:
        return self._bytes.decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        """A carriage return leads back to the first column, and what follows stands over what was there."""
        assert "\x1b" not in self.written, "more than one bar, which this can't read"
        assert self.written.endswith(("\n", "\r")) or not self.written, (
            f"the prompt comes behind {self.written[-80:]!r}"
        )
        seen = []
        for line in self.written.split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            seen.append(shown.rstrip())
        return seen[: -1 if not seen[-1] else None]


class Run:
    """A command on a terminal."""

    def __init__(self, process: Process, terminal: Terminal) -> None:
        self.process, self.terminal = process, terminal

    def shows(self, text: str) -> None:
        end = time.monotonic() + 30
        while text not in self.terminal.written:
            assert self.process.poll() is None, f"ended without {text!r}: {self.terminal.written}"
            assert time.monotonic() < end, f"no {text!r} in 30 s: {self.terminal.written}"
            time.sleep(0.02)

    def ends(self, number: signal.Signals | None = None) -> int:
        if number:
            self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def on_terminal(
    database: Database, main: str, *args: str, env: Mapping[str, str] = NOTHING, patch: str = ""
) -> Iterator[Run]:
    """A command whose stdout and stderr are a terminal; it has ended after the block.

    `patch` is Python that changes something in the package first.
    """
    terminal = Terminal()
    process = forkserver.start(
        _program(main, args, patch),
        cwd=ROOT,
        env=environment(database, {"TERM": "xterm", **env}),
        stdout=terminal.stream,
        stderr=terminal.stream,
    )
    run = Run(process, terminal)
    try:
        yield run
        run.ends()
    finally:
        process.kill()
        process.wait()
        terminal.end()


def in_a_pipe(database: Database, main: str, *args: str, env: Mapping[str, str] = NOTHING, patch: str = "") -> Result:
    """The same, as a pipeline runs it."""
    env = environment(database, {"TERM": "xterm", **env})
    return result(forkserver.start(_program(main, args, patch), cwd=ROOT, env=env))


def _program(main: str, args: tuple[str, ...], patch: str) -> list[str]:
    program = f"import sys\n{patch}\nfrom {main} import main\nsys.exit(main(sys.argv[1:]))"
    return ["-c", program, *args]
