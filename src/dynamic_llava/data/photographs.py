"""Photographs with captions or with questions, from the JSONL files of Flickr8k and of DAQUAR.

A line is an object with ``image``, ``split``, and ``captions``, a list, or ``question`` and ``answer``; the
pictures lie where the file is. Both sets are for research use; their pictures do not come with this package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.data.entries import entries

CAPTION_REQUESTS = (
    "Describe the picture in one sentence.",
    "What does the picture show?",
    "What do you see?",
    "Write a caption for this photograph.",
)
"""Training draws from these; evaluation asks the first."""

DESCRIPTION_REQUESTS = ("Describe the picture in five sentences.", "Describe the picture in detail.")
"""The same for long answers."""

SHORTLY = "Answer the question using a single word or phrase."
"""What LLaVA adds to a question that wants a short answer."""


@dataclass(frozen=True)
class Photograph:
    """A picture's file, what people wrote about it, and what they asked.

    Attributes
    ----------
    captions
        Sentences, each written without knowledge of the others.
    questions
        (question, answer).
    """

    path: Path
    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()


def captioned(path: Path, split: str) -> list[Photograph]:
    """Return the photographs of a split with their captions as sentences, in the order of the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a line has another layout, or no line is of that split.
    """
    found = []
    for number, entry in _of_split(path, split):
        captions = entry.get("captions")
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise ValueError(f"{path}, line {number}: 'captions' must be a list of sentences")
        found.append(Photograph(path.parent / entry["image"], tuple(map(sentence, captions))))
    return found


def questioned(path: Path, split: str) -> list[Photograph]:
    """Return the photographs of a split with all their questions; raises as :func:`captioned` does."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for number, entry in _of_split(path, split):
        if not all(isinstance(entry.get(name), str) for name in ("question", "answer")):
            raise ValueError(f"{path}, line {number}: 'question' and 'answer' must be texts")
        pairs.setdefault(entry["image"], []).append((question(entry["question"]), entry["answer"]))
    return [Photograph(path.parent / image, questions=tuple(turns)) for image, turns in pairs.items()]


def sentence(caption: str) -> str:
    """Write a tokenised caption as a sentence: a capital, no spaces before marks, a full stop at the end."""
    text = re.sub(r"\s+([.,;:!?])", r"\1", " ".join(caption.split())).rstrip(" .")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def question(text: str) -> str:
    """Write a tokenised question as one, with the request for a short answer behind it."""
    asked = text.strip().rstrip(" ?")
    return f"{asked[:1].upper()}{asked[1:]}?\n{SHORTLY}"


def _of_split(path: Path, split: str) -> Sequence[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the JSONL file of the photographs")
    found = []
    for number, (_, _, entry) in enumerate(entries(path), start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise ValueError(f"{path}, line {number}: expected an object with the name of an 'image'")
        if entry.get("split") == split:
            found.append((number, entry))
    if not found:
        raise ValueError(f"{path}: holds no line of the split {split!r}")
    return found
