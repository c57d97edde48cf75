"""What commands print: data on stdout, as lines for people or as JSON for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def write(options: argparse.Namespace, data: Mapping[str, Any], lines: Sequence[tuple[str, object]]) -> None:
    """`data` with --json, else `lines` of a name and what is to be said of it."""
    if options.json:
        print(json.dumps(data, indent=2, default=str))
    else:
        width = max((len(name) for name, _ in lines), default=0) + 2
        for name, value in lines:
            print(f"{name + ':':<{width}}{value}" if name else f"{'':{width if width > 2 else 0}}{value}")
    sys.stdout.flush()
