"""Conversations in LLaVA's layout, read one at a time from a JSON list or a JSONL file of any size.

The layout is that of LLaVA's instruction mix, LVIS-Instruct4V and ShareGPT4V: ``{"id", "image",
"conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", "value": "..."}, ...]}``, without
``image`` and ``<image>`` for text alone.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dynamic_llava.chat.prompt import PLACEHOLDER, check_text
from dynamic_llava.data.entries import entries
from dynamic_llava.files import check_input, one_line, parse_json

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LONGEST_NAME = 80  # characters of an id that messages show

OnError = Literal["raise", "skip"]


class BadSample(ValueError):
    """An entry that cannot be trained on; the message names its id or number, in one line.

    Processes that load data hand on an error as a new one with their traceback before its message, which is
    taken off here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message.rpartition(f"{BadSample.__name__}: ")[2]))


@dataclass(frozen=True)
class Conversation:
    """One entry: pictures, and turns that begin with a question.

    Attributes
    ----------
    name
        The entry's id, or its number where it has none.
    images
        Paths of its pictures, in the order of their placeholders.
    turns
        (question, answer); questions may hold ``<image>``.
    """

    name: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]


class Conversations(Sequence[Conversation]):
    """The entries of a file; only where each of them lies is held in memory.

    Parameters
    ----------
    path
        JSON list or JSONL file.
    image_folder
        Folder that the entries' pictures are relative to; that of ``path`` by default.
    on_error
        ``"skip"`` takes lines that are no JSON as broken entries; ``"raise"`` refuses their file.

    Attributes
    ----------
    characters
        Length of each entry's text, for grouping by length; pictures are not counted.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If the file is no JSON list of objects and no JSONL.
    """

    def __init__(self, path: Path, image_folder: Path | None = None, on_error: OnError = "raise") -> None:
        check_input(path, "file of conversations")
        if image_folder is not None and not image_folder.is_dir():
            raise FileNotFoundError(f"{image_folder}: no such folder of pictures")
        self.path = path
        self.image_folder = image_folder or path.parent
        self._version = _version(path.stat())
        self._start, self._bytes = array("q"), array("q")
        self.characters = array("q")
        for start, size, entry in entries(path, broken_lines=on_error == "skip"):
            self._start.append(start)
            self._bytes.append(size)
            self.characters.append(_text_length(entry))
        if not self._start:
            raise ValueError(f"{path}: no entries; expected a JSON list or lines of conversations")
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._start)

    def __getitem__(self, index: Any) -> Any:
        """Read one entry, checked; raises :class:`BadSample`."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if self._file is None:
            self._file = self.path.open("rb")
        if _version(os.fstat(self._file.fileno())) != self._version:
            raise ValueError(f"{self.path}: changed since it was first read; start again to read it anew")
        self._file.seek(self._start[index])
        where = f"{self.path.name}, entry {index}"
        try:
            entry = parse_json(self._file.read(self._bytes[index]))
        except ValueError as error:
            raise BadSample(f"{where}: {error}") from error
        return self._checked(entry, index, where)

    def fingerprint(self, limit: int | None = None) -> dict[str, Any]:
        """Return the number of the first ``limit`` entries, and a digest of what they say, in their order."""
        digest = hashlib.sha256()
        places = list(zip(self._start, self._bytes, strict=True))[:limit]
        with self.path.open("rb") as file:
            for start, size in places:
                file.seek(start)
                digest.update(file.read(size).strip() + b"\n")
        return {"entries": len(places), "sha256": digest.hexdigest()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: every process that loads data opens its own."""
        return {**self.__dict__, "_file": None}

    def _checked(self, entry: Any, index: int, where: str) -> Conversation:
        if not isinstance(entry, dict):
            raise BadSample(f"{where}: expected an object, found {type(entry).__name__}")
        name = name_of(entry.get("id"), index)
        where += f" (id {name})"
        if entry.get("video"):
            raise BadSample(f"{where}: videos cannot be trained on; leave the entry out")
        images = _images(entry.get("image"), where)
        turns = rounds(entry.get("conversations"), where)
        if any(PLACEHOLDER in answer for _, answer in turns):
            raise BadSample(f"{where}: {PLACEHOLDER} in an answer")
        placeholders = sum(question.count(PLACEHOLDER) for question, _ in turns)
        if placeholders != len(images):
            raise BadSample(
                f"{where}: {placeholders} {PLACEHOLDER} for {len(images)} pictures; they must agree"
            )
        return Conversation(name, tuple(self.image_folder / image for image in images), turns)


def name_of(given: Any, number: int) -> str:
    """Return what messages call an entry: its id, in one short line, or its number where it has none."""
    name = "" if given is None else one_line(str(given))
    if len(name) > LONGEST_NAME:
        name = name[:LONGEST_NAME] + "..."
    return name or str(number)


def rounds(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Return the (question, answer) pairs of an entry's messages; raise :class:`BadSample` with ``where``."""
    if not isinstance(messages, list) or not messages:
        raise BadSample(f"{where}: no conversations")
    spoken = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise BadSample(f"{where}: every message needs 'from' and 'value'")
        role = message.get("from")
        if not isinstance(role, str) or role not in ROLES:
            shown = name_of(repr(role), 0)
            raise BadSample(f"{where}: unknown role {shown}; known are {', '.join(ROLES)}")
        try:
            check_text(message["value"])
        except ValueError as error:
            raise BadSample(f"{where}: {error}") from error
        spoken.append((ROLES[role], message["value"]))
    if spoken[0][0] == "assistant":  # ShareGPT's excerpts may begin in the middle
        spoken = spoken[1:]
    roles = [role for role, _ in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadSample(f"{where}: questions and answers do not take turns; each question needs one answer")
    values = [value for _, value in spoken]
    return tuple(zip(values[::2], values[1::2], strict=True))


def _images(given: Any, where: str) -> list[str]:
    """Return the names of an entry's pictures."""
    if given is None or given == "":
        return []
    images = given if isinstance(given, list) else [given]
    for image in images:
        if not isinstance(image, str):
            raise BadSample(
                f"{where}: 'image' holds {type(image).__name__}; it must be the name of a picture, or a list "
                "of names"
            )
    return images


def _version(status: os.stat_result) -> tuple[int, int]:
    """Return what changes when a file is written."""
    return status.st_size, status.st_mtime_ns


def _text_length(entry: Any) -> int:
    messages = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(messages, list):
        return 0
    return sum(len(str(message.get("value", ""))) for message in messages if isinstance(message, dict))
