"""What commands print beside their tables, and how they name themselves in result files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from dynamic_llava.files import as_json


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object as a line of its own, as ``--json`` promises."""
    typer.echo(as_json(content))


def say_written(*paths: Path) -> None:
    """Tell which files a command has written."""
    for path in paths:
        typer.echo(f"written: {path}", err=True)


def command_line() -> str:
    """Return the command that runs, as a user types it."""
    return shlex.join(["dynamic-llava", *sys.argv[1:]])
