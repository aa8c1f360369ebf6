"""Reads questions with long reference answers from a user's file: LLaVA's layout, or plain lines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dynamic_llava.chat.images import open_image
from dynamic_llava.chat.prompt import PLACEHOLDER, check_text
from dynamic_llava.data.conversations import name_of, rounds
from dynamic_llava.data.entries import entries
from dynamic_llava.evaluation.meteor import SENTENCE_END
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.files import check_input


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
    check_input(path, "file of questions and answers")
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; give --images the folder of the pictures")
    found: list[Question] = []
    for number, (_, _, sample) in enumerate(entries(path), start=1):
        given = sample.get("id", sample.get("question_id")) if isinstance(sample, dict) else None
        found += _questions(sample, images, where=f"{path}: sample {name_of(given, number)}")
    if not found:
        raise ValueError(f"{path}: holds no sample; give a JSON list, or one object a line")
    return found


def sentences(text: str) -> list[str]:
    """Part a text at the marks that end a sentence."""
    return [part for part in SENTENCE_END.split(text.strip()) if part]


def _questions(sample: Any, images: Path, where: str) -> list[Question]:
    if not isinstance(sample, dict):
        raise ValueError(f"{where}: is no object; a sample is an object with an image, a question, an answer")
    turns = _turns(sample, where)
    if not isinstance(sample.get("image"), str):
        raise ValueError(f"{where}: 'image' must be the name of one picture; leave out samples without any")
    picture = images / sample["image"]
    try:
        check_input(picture, "picture")
    except (OSError, ValueError) as error:
        raise type(error)(f"{where}: {error}, and --images") from error
    return [
        Question(
            partial(open_image, picture),
            text,
            answer,
            "generation",
            tuple(turns[:index]),
            where,
            references=tuple(sentences(answer)),
            picture=sample["image"],
        )
        for index, (text, answer) in enumerate(turns)
    ]


def _turns(sample: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a sample, in order."""
    if "conversations" in sample:
        pairs = list(rounds(sample["conversations"], where))
    elif "question" in sample and "answer" in sample:
        pairs = [(sample["question"], sample["answer"])]
    elif "question" in sample or "text" in sample:
        raise ValueError(f"{where}: a reference answer is missing; give 'question' and 'answer'")
    else:
        raise ValueError(f"{where}: unknown layout; give 'conversations', or 'question' and 'answer'")
    for number, pair in enumerate(pairs, start=1):
        if not all(isinstance(text, str) and text.replace(PLACEHOLDER, "").strip() for text in pair):
            raise ValueError(f"{where}: turn {number} has an empty question or answer; write text in both")
        try:
            check_text("".join(pair))
        except ValueError as error:
            raise ValueError(f"{where}: turn {number}: {error}") from error
        if pair[0].count(PLACEHOLDER) > (number == 1) or PLACEHOLDER in pair[1]:
            raise ValueError(f"{where}: turn {number} has one {PLACEHOLDER} too many; one picture a sample")
    return pairs
