"""Conversations in LLaVA's layout, read one at a time from a JSON list or a JSONL file of any size.

The layout is that of LLaVA's instruction mix, LVIS-Instruct4V and ShareGPT4V: ``{"id", "image",
"conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", "value": "..."}, ...]}``, without
``image`` and ``<image>`` for text alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dynamic_llava.chat.prompt import PLACEHOLDER
from dynamic_llava.data.entries import entries

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class BadSample(ValueError):
    """An entry that cannot be trained on; the message names its id or number."""


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

    def __init__(self, path: Path, image_folder: Path | None = None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of conversations")
        if image_folder is not None and not image_folder.is_dir():
            raise FileNotFoundError(f"{image_folder}: no such folder of pictures")
        self.path = path
        self.image_folder = image_folder or path.parent
        self._version = _version(path.stat())
        self._start, self._bytes = array("q"), array("q")
        self.characters = array("q")
        for start, size, entry in entries(path):
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
        return self._checked(json.loads(self._file.read(self._bytes[index])), index)

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

    def _checked(self, entry: Any, index: int) -> Conversation:
        where = f"{self.path.name}, entry {index}"
        if not isinstance(entry, dict):
            raise BadSample(f"{where}: expected an object, found {type(entry).__name__}")
        name = str(entry.get("id", index))
        where += f" (id {name})"
        images = entry.get("image") or []
        images = [images] if isinstance(images, str) else images
        turns = rounds(entry.get("conversations"), where)
        if any(PLACEHOLDER in answer for _, answer in turns):
            raise BadSample(f"{where}: {PLACEHOLDER} in an answer")
        placeholders = sum(question.count(PLACEHOLDER) for question, _ in turns)
        if placeholders != len(images):
            raise BadSample(
                f"{where}: {placeholders} {PLACEHOLDER} for {len(images)} pictures; they must agree"
            )
        return Conversation(name, tuple(self.image_folder / image for image in images), turns)


def rounds(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Return the (question, answer) pairs of an entry's messages; raise :class:`BadSample` with ``where``."""
    if not isinstance(messages, list) or not messages:
        raise BadSample(f"{where}: no conversations")
    spoken = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise BadSample(f"{where}: every message needs 'from' and 'value'")
        if message.get("from") not in ROLES:
            raise BadSample(f"{where}: unknown role {message.get('from')!r}; known are {', '.join(ROLES)}")
        spoken.append((ROLES[message["from"]], message["value"]))
    if spoken[0][0] == "assistant":  # ShareGPT's excerpts may begin in the middle
        spoken = spoken[1:]
    roles = [role for role, _ in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadSample(f"{where}: questions and answers do not take turns; each question needs one answer")
    values = [value for _, value in spoken]
    return tuple(zip(values[::2], values[1::2], strict=True))


def _version(status: os.stat_result) -> tuple[int, int]:
    """Return what changes when a file is written."""
    return status.st_size, status.st_mtime_ns


def _text_length(entry: Any) -> int:
    messages = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(messages, list):
        return 0
    return sum(len(str(message.get("value", ""))) for message in messages if isinstance(message, dict))
