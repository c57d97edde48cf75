"""Commands of the console script."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Command:
    """`run` returns the exit code and raises MigrationError; the first paragraph of `description` is the help."""

    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    @property
    def help(self) -> str:
        return self.description.partition("\n\n")[0]


def of(module: ModuleType) -> Command:
    return Command(module.__doc__ or "", module.arguments, module.run)
