"""What doctor and check say about one thing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import MigrationError


@dataclass(frozen=True)
class Finding:
    """`code` is stable, for programs; hint is what mends it, to be pasted where it says."""

    severity: Literal["error", "warning", "notice"]
    code: str
    message: str
    detail: str | None = None
    hint: str | None = None

    @classmethod
    def of(cls, code: str, error: MigrationError) -> Finding:
        return cls("error", code, error.message, error.detail, error.hint)

    @classmethod
    def of_rows(cls, rows: Iterable[Any]) -> list[Finding]:
        """Of a block of requirements: what does not hold, the first thing first."""
        return [cls(severity, code, message, detail, hint) for code, severity, message, detail, hint in rows]

    @property
    def error(self) -> MigrationError:
        return MigrationError(self.message, detail=self.detail, hint=self.hint)

    def __str__(self) -> str:
        lines = [f"{self.severity.upper()}:  {self.message}"]
        lines += [f"DETAIL:  {self.detail}"] if self.detail else []
        lines += [f"HINT:  {self.hint}"] if self.hint else []
        return "\n".join(lines)
