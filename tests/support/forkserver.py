"""Processes for commands, forked from one that has imported everything: 6 ms to start and end one, instead of 500.

They are processes in every respect: killed, signalled and asked for their exit code as any other. What only a start
from nothing shows (an import that fails, variables that Python itself reads) needs `subprocess`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

ROOT = Path(__file__).parent.parent.parent
MODULES = [
    *("alembic.config", "alembic.command", "sqlalchemy.dialects.postgresql", "psycopg2", "numpy", "matplotlib.figure"),
    # not tqdm, which reads its variables when it is imported
    *("asyncpg", "psycopg", "sqlalchemy.ext.asyncio"),
    *("openmemory_migrations.cli", "openmemory_migrations.ops", "openmemory_migrations.environment"),
]
Fd = int | IO[str]


class Process:
    """A command that was started; the part of subprocess.Popen that tests use."""

    def __init__(self, pid: int, report: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._report = report

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.communicate()

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._report.recv(16))
            self._report.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written, once it has ended."""
        written = ["", ""]

        def read(number: int, pipe: IO[str] | None) -> None:
            if pipe and not pipe.closed:
                with pipe:
                    written[number] = pipe.read()

        readers = [threading.Thread(target=read, args=one) for one in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for reader in readers:
                reader.join()
        return written[0], written[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[str],
    *,
    cwd: str | Path,
    env: Mapping[str, str],
    stdout: Fd | None = None,
    stderr: Fd | None = None,
) -> Process:
    """Start `python …` with such arguments: `-m module …`, `-c code …` or `file …`. None is a pipe to read from."""
    pipes: list[IO[str] | None] = []
    passed, opened = [], []
    for given in (stdout, stderr):
        if given is None:
            reading, writing = os.pipe()
            pipes.append(os.fdopen(reading))
            opened.append(writing)
            passed.append(writing)
        else:
            pipes.append(None)
            passed.append(given if isinstance(given, int) else given.fileno())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = json.dumps({"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}).encode()
    with _lock:
        socket.send_fds(_server(), [request], [*passed, theirs.fileno()])
        theirs.close()
        for writing in opened:
            os.close(writing)
        pid = int(ours.recv(16))
    return Process(pid, ours, *pipes)


_lock = threading.Lock()


@functools.cache
def _server() -> socket.socket:
    """One for each process of the tests; it ends with them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def end_it() -> None:
        ours.close()
        process.wait()

    atexit.register(end_it)
    return ours


def _serve(requests: socket.socket) -> list[str]:
    """Fork for each request. Returns in the child, with what it has to run."""
    reports: dict[int, socket.socket] = {}

    def reap(number: int, frame: FrameType | None) -> None:
        for pid in list(reports):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with reports.pop(pid) as report, suppress(OSError):
                    report.send(str(os.waitstatus_to_exitcode(status)).encode())

    signal.signal(signal.SIGCHLD, reap)
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            break
        reports[pid] = socket.socket(fileno=fds[2])
        with suppress(OSError):
            reports[pid].send(str(pid).encode())
        for fd in fds[:2]:
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    requests.close()
    for other in reports.values():
        other.close()
    request = json.loads(message)
    for fd, standard in zip(fds[:2], (1, 2), strict=True):
        os.dup2(fd, standard)
    for fd in fds:
        os.close(fd)
    buffering = 1 if os.isatty(1) else -1
    sys.stdout = os.fdopen(1, "w", buffering, closefd=False)
    # what can't be written is not kept, as in the stderr that Python makes
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", write_through=True)
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    arguments: list[str] = request["arguments"]
    return arguments


def _run(what: str, *arguments: str) -> None:
    """As Python runs its arguments."""
    if what == "-m":
        sys.path[0], sys.argv = os.getcwd(), list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(what).resolve().parent), [what, *arguments]
        runpy.run_path(what, run_name="__main__")


def _end(arguments: Sequence[str]) -> NoReturn:
    """As Python ends, but for taking apart all that is imported: that takes ten times as long as all the rest."""
    code = 0
    try:
        _run(*arguments)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        if isinstance(asked.code, str):
            print(asked.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing's processes end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def _main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    for module in MODULES:
        with suppress(ImportError):  # the oldest environment has not all of them
            importlib.import_module(module)
    gc.freeze()
    _end(_serve(requests))


if __name__ == "__main__":
    _main()
