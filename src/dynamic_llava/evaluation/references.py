"""Reads questions with long reference answers from a user's file: LLaVA's layout, or plain lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dynamic_llava.chat import PLACEHOLDER
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.images import open_image


def references(path: Path, images: Path) -> list[Question]:
    """Return every question of a file that has a reference answer; pictures are opened when asked about.

    Parameters
    ----------
    path : Path
        JSON (a list) or JSONL. Each sample has an ``image``, and either LLaVA's ``conversations`` (LVIS-VQA,
        ShareGPT4V), where every answer is a reference and the turns before it are its context, or
        ``question`` and ``answer``.
    images : Path
        Folder that ``image`` is relative to.

    Raises
    ------
    FileNotFoundError
        The file, the folder or a picture is missing.
    ValueError
        The file is no JSON, holds no sample, or a sample has another layout.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give --data a JSON or JSONL file")
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; give --images the folder of the pictures")
    found: list[Question] = []
    for number, sample in enumerate(_samples(path), start=1):
        name = sample.get("id", sample.get("question_id", number)) if isinstance(sample, dict) else number
        found += _questions(sample, images, where=f"{path}: sample {name}")
    if not found:
        raise ValueError(f"{path}: holds no sample; give a JSON list, or one JSON object a line")
    return found


def _samples(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text; give a JSON or JSONL file") from error
    if text.lstrip().startswith("["):
        yield from _parsed(text, f"{path}")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parsed(line, f"{path}, line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: no valid JSON ({error.msg}); give a JSON list, or one object a line"
        ) from error


def _questions(sample: Any, images: Path, where: str) -> list[Question]:
    if not isinstance(sample, dict):
        raise ValueError(f"{where}: is no object; a sample is an object with an image, a question, an answer")
    turns = _turns(sample, where)
    if not isinstance(sample.get("image"), str):
        raise ValueError(f"{where}: 'image' must be the name of one picture; leave out samples without any")
    picture = images / sample["image"]
    if not picture.is_file():
        raise FileNotFoundError(f"{where}: no such picture: {picture}; check --images")
    return [
        Question(partial(open_image, picture), text, answer, "generation", earlier=tuple(turns[:index]))
        for index, (text, answer) in enumerate(turns)
    ]


def _turns(sample: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a sample, in order."""
    if "conversations" in sample:
        pairs = _rounds(sample["conversations"], where)
    elif "question" in sample and "answer" in sample:
        pairs = [(sample["question"], sample["answer"])]
    elif "question" in sample or "text" in sample:
        raise ValueError(f"{where}: a reference answer is missing; give 'question' and 'answer'")
    else:
        raise ValueError(f"{where}: unknown layout; give 'conversations', or 'question' and 'answer'")
    for number, pair in enumerate(pairs, start=1):
        if not all(isinstance(text, str) and text.replace(PLACEHOLDER, "").strip() for text in pair):
            raise ValueError(f"{where}: turn {number} has an empty question or answer; write text in both")
        if pair[0].count(PLACEHOLDER) > (number == 1) or PLACEHOLDER in pair[1]:
            raise ValueError(f"{where}: turn {number} has one {PLACEHOLDER} too many; one picture a sample")
    return pairs


def _rounds(messages: Any, where: str) -> list[tuple[str, str]]:
    """Pair LLaVA's messages, which alternate between ``human`` and ``gpt``."""
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    speakers = [message.get("from") for message in messages] if is_list else []
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(
            f"{where}: 'conversations' must alternate 'human' and 'gpt', and end with 'gpt': "
            "every question needs its reference answer"
        )
    texts = [message.get("value") for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))
