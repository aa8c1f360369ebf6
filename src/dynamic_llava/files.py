"""Writes files so that no reader ever meets half of one; tells in a line why one cannot be read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

TOO_DEEP = "lists or objects lie too deep in each other"


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


def parse_json(text: bytes) -> Any:
    """Read one JSON value; whatever goes wrong is a ``ValueError`` with the reason."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from error
    except ValueError as error:  # also numbers of thousands of digits
        raise ValueError(f"not JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It holds something else, or is no file.
    """
    check_input(path, "JSON file")
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, it must be an object of settings")
    return found


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


def check_input(path: Path, what: str) -> None:
    """Refuse a file that cannot be read, before it is opened.

    Parameters
    ----------
    what
        What it should be, for the message.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is a folder, a pipe or a device, or its name cannot be one.
    """
    shown = one_line(str(path))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{shown}: no such {what}; check the path") from error
    except (
        OSError,
        ValueError,
    ) as error:  # a name that is too long or no text, a folder that is closed to us
        raise ValueError(f"{shown}: cannot be read: {first_line(error)}; check the path") from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{shown}: is not a file but {found}; give the path of a {what}")


def first_line(error: Exception) -> str:
    """Return an error's message without the advice that follows it."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


def one_line(text: str) -> str:
    """Return a message that any terminal takes: in one line, halves of surrogate pairs written out."""
    return " ".join(text.split()).encode(errors="backslashreplace").decode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON with a final newline."""
    with replacing(path) as partial:
        partial.write_text(as_json(content, indent=2) + "\n", encoding="utf-8")


def as_json(content: Mapping[str, Any], indent: int | None = None) -> str:
    """Return JSON that can be written: halves of surrogate pairs, as names of files may hold, are escaped."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial{path.suffix}")  # the suffix stays: writers choose by it
