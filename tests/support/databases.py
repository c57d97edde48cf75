"""Databases that are made once for each process of the tests, and copied for each test: a tenth of the time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from psycopg2.sql import SQL, Identifier

from openmemory_migrations import embedded
from tests.support.openmemory import Database, create_database, drop_database


class Databases:
    """Those of one server, each with a name of its own."""

    def __init__(self, server: embedded.Server) -> None:
        self.server = server
        self._numbers = itertools.count()
        self._templates: dict[tuple[Hashable, ...], Database] = {}

    @contextmanager
    def empty(self) -> Iterator[Database]:
        """Not even the extension is in it."""
        database = create_database(self.server, self._name())
        yield database
        drop_database(self.server, database.name)

    @contextmanager
    def copy(self, make: Callable[..., object], *args: Hashable) -> Iterator[Database]:
        """What `make(database, *args)` makes of an empty one; it is called once for the same arguments."""
        with self.copy_of(self._template(make, *args)) as database:
            yield database

    @contextmanager
    def copy_of(self, template: Database) -> Iterator[Database]:
        """The same as the template, in which nobody may have a session."""
        name = self._name()
        create = SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(template.name))
        Database("postgres", self.server.url()).run(create)
        yield Database(name, self.server.url(name))
        drop_database(self.server, name)

    def _template(self, make: Callable[..., object], *args: Hashable) -> Database:
        key = (make, *args)
        if key not in self._templates:
            database = create_database(self.server, self._name())
            make(database, *args)
            self._templates[key] = database
        return self._templates[key]

    def _name(self) -> str:
        return f"test_{next(self._numbers)}"
