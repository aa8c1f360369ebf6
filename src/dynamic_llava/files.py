"""Writes files so that no reader ever meets half of one; tells in a line why one cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def check_file(option: str, path: Path) -> None:
    """Refuse a file that cannot be written, before hours are spent on what goes there.

    Parameters
    ----------
    option
        What named the file, for the message.
    path
        The file; it may exist, and folders above it may be missing.

    Raises
    ------
    ValueError, OSError
        It is a folder, a device or read-only, its name is too long, or its folder cannot be written to.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} is {path}: it must name a file, not a folder or a device")
    # Root may write what nobody may; a file without a single right to write is meant to stay all the same.
    if path.exists() and not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
        raise ValueError(f"{option}: {path} is read-only, choose another")
    _partial(path).exists()  # an OSError where the name is too long
    check_folder(option, path.parent)


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be written to or made; see `check_file`."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=existing):  # rights alone do not tell: disks are full, or mounted to be read
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: {existing} is no folder that can be written to, choose another"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` to write to; rename it to ``path`` once the block has succeeded.

    Missing folders are made. If the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """Return an error's message without the advice that follows it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON with a final newline."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial{path.suffix}")  # the suffix stays: writers choose by it
