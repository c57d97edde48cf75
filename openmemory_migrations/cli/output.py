"""What commands print: data on stdout, as lines for people or as JSON for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def nothing(options: argparse.Namespace) -> int:
    """Where there is no Postgres, or `v` is a vector already, which the log has said: fine, and no more to say."""
    write(options, {"fine": True}, [])
    return 0


def write(options: argparse.Namespace, data: Mapping[str, Any], lines: Sequence[tuple[str, object]]) -> None:
    """`data` with --json, else `lines` of a name and what is to be said of it."""
    print(as_json(data) if options.json else as_text(lines), end="", flush=True)


def as_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"


def as_text(lines: Sequence[tuple[str, object]]) -> str:
    width = max((len(name) for name, _ in lines), default=0) + 2
    indent = width if width > 2 else 0
    return "".join(f"{name + ':':<{width}}{value}\n" if name else f"{'':{indent}}{value}\n" for name, value in lines)
