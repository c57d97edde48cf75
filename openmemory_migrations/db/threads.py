"""Work in threads beside the one that Alembic runs in, each on a connection of its own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, Full, Queue
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from .. import log
from ..errors import MigrationError
from .database import Database, in_thread
from .signals import Stop
from .sqlerrors import as_migration_error

PATIENCE = 5.0  # seconds, with a connection that isn't there yet when nobody wants it any more
LOOK = 0.1  # seconds between two looks at whether the other side has ended

T = TypeVar("T")


class Beside:
    """Runs `work` in a thread, on a connection beside `db`; leaving the block ends it.

    `connected` stays False where there is no connection left to have, and `error` is what `work` or connecting raised.
    Signals come to `db` alone: who waits for this has to look at them.
    """

    def __init__(self, db: Database, work: Callable[[Database], None]) -> None:
        self.connected = False
        self.error: BaseException | None = None
        self._parent, self._work = db, work
        self._stop = Stop()
        self._cancel: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="openmemory-migrations", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Waits for its end, heeding signals, and raises what its work has raised."""
        while self.alive:
            self._parent.stop.check()
            self._thread.join(LOOK)
        if not self.refused:
            self.raise_error()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    @property
    def refused(self) -> MigrationError | None:
        """Why there was no connection to work on."""
        if self.connected:
            return None
        if isinstance(self.error, DBAPIError):
            return as_migration_error(self.error, "no further connection")
        return self.error if isinstance(self.error, MigrationError) else None

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        given_up = time.monotonic() + PATIENCE
        # what still waits for its connection can't be cancelled; it does nothing once it has one
        while self.alive and (self.connected or time.monotonic() < given_up):
            self._stop.ask(signal.SIGTERM)
            self._cancel()
            self._thread.join(LOOK)

    def _run(self) -> None:
        try:
            in_thread(self._parent.connection.engine, self._connect)
        except BaseException as error:  # for the thread that waits
            self.error = error

    def _connect(self) -> None:
        with self._parent.beside(self._stop) as db:
            self.connected = True

            def cancel() -> None:
                with suppress(Exception):  # the connection may be gone already
                    db.driver.cancel()

            self._cancel = cancel
            self._stop.check()
            self._work(db)


def side_by_side(db: Database, works: Sequence[Callable[[Database], None]]) -> None:
    """Runs the first on `db` and each other on a connection of its own; one that gets none is left out."""
    with ExitStack() as running:
        others = [running.enter_context(Beside(db, work)) for work in works[1:]]
        works[0](db)
        for other in others:
            other.join()
            if refused := other.refused:
                log.notice(refused.message, detail="The other workers have done its share.")


@contextmanager
def ahead(db: Database, produce: Callable[[Database], Iterator[T]]) -> Iterator[Iterator[T]]:
    """Yields what `produce` gives, made one ahead on a connection of its own; where there is none, in turn on `db`.

    A pooler in transaction mode has none to spare: a small pool would be used up by runs that wait for each other.
    """
    with db.transaction():
        pooled = db.pooled
    if pooled:
        yield produce(db)
        return
    made: Queue[T] = Queue(maxsize=1)

    def work(other: Database) -> None:
        for item in produce(other):
            while True:
                other.stop.check()
                with suppress(Full):
                    made.put(item, timeout=LOOK)
                    break

    def take() -> Iterator[T]:
        while True:
            # asked before the queue is: what a thread has made, it has made before its end
            alive = producer.alive
            try:
                yield made.get(timeout=LOOK if alive else 0)
            except Empty:
                db.stop.check()
                if not alive:
                    break
        if refused := producer.refused:
            log.notice(refused.message, detail="Reading and writing take turns on one connection.")
            yield from produce(db)
        else:
            producer.raise_error()

    with Beside(db, work) as producer:
        yield take()
