"""The entries of a JSON list or a JSONL file of any size, one at a time, and where each lies in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dynamic_llava.files import TOO_DEEP, parse_json

BLOCK = 2**20  # characters of a JSON list that are looked at together
SPACE = re.compile(r"[ \t\r\n]*")
MARK = "\ufeff"  # with which some editors begin a file


def entries(path: Path, broken_lines: bool = False) -> Iterator[tuple[int, int, Any]]:
    """Yield where each entry of a JSON list or JSONL file lies, its size in bytes, and the entry.

    Parameters
    ----------
    broken_lines
        Yield a line that cannot be read, too, with None as its entry; a list has no such lines.

    Raises
    ------
    ValueError
        If the file is neither, whole.
    """
    first = _first(path)
    if first == b"{":
        yield from _line_entries(path, broken_lines)
    elif first == b"[":
        yield from _list_entries(path)
    else:
        found = f"it begins with {first.decode(errors='backslashreplace')!r}" if first else "it is empty"
        raise ValueError(f"{path}: neither a JSON list nor JSON lines of objects; {found}")


def _first(path: Path) -> bytes:
    """Return the first byte that is no space, b"" in an empty file."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            if text := block.removeprefix(MARK.encode()).strip():
                return text[:1]
    return b""


def _line_entries(path: Path, broken_lines: bool) -> Iterator[tuple[int, int, Any]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    entry = parse_json(line)
                except ValueError as error:
                    if not broken_lines:
                        raise ValueError(f"{path}, line {number}: {error}") from error
                    entry = None
                yield start, len(line), entry
            start += len(line)


def _list_entries(path: Path) -> Iterator[tuple[int, int, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from _listed(path, _Text(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {TOO_DEEP}") from error


def _listed(path: Path, text: _Text) -> Iterator[tuple[int, int, Any]]:
    """Yield the entries of the list that ``text`` begins with, with little of it in memory."""
    text.next()
    text.skip(1)
    separator = "]" if text.next() == "]" else ","
    while separator == ",":
        text.next()
        start = text.position
        try:
            entry = text.value()
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path}: not a JSON list: {reason}, after byte {start}") from error
        yield start, text.position - start, entry
        separator = text.next()
        if separator not in (",", "]"):
            found = repr(separator) if separator else "the end of the file"
            raise ValueError(f"{path}: not a JSON list: {found} after an entry, at byte {text.position}")
        if separator == ",":
            text.skip(1)
    text.skip(1)
    if text.next():
        raise ValueError(
            f"{path}: more than one JSON list: {text.next()!r} follows it, at byte {text.position}"
        )


class _Text:
    """The text of a file from some place on, read in blocks.

    Attributes
    ----------
    position
        Where that place is, in bytes.
    """

    def __init__(self, file: TextIO) -> None:
        self.position = 0
        self._file = file
        self._text, self._place = file.read(BLOCK), 0
        if self._text.startswith(MARK):
            self.skip(1)

    def next(self) -> str:
        """Go on to the next character that is no space and return it, "" at the end of the file."""
        while True:
            self.skip(SPACE.match(self._text, self._place).end() - self._place)  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def skip(self, characters: int) -> None:
        """Go on by some characters of what has been looked at."""
        end = self._place + characters
        self.position += len(self._text[self._place : end].encode())
        self._place = end

    def value(self) -> Any:
        """Return the JSON value that begins here and go on behind it."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if not self._more():
                    raise
            else:
                self.skip(end - self._place)
                return value

    def _more(self) -> bool:
        """Read one more block and forget what lies behind."""
        block = self._file.read(BLOCK)
        self._text, self._place = self._text[self._place :] + block, 0
        return bool(block)
