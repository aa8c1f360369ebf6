"""DAQUAR's test split: short answers about indoor scenes, exactly right or close by WordNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.images import open_image
from dynamic_llava.data.photographs import questioned
from dynamic_llava.evaluation.batches import Kept, answer, batches
from dynamic_llava.evaluation.intervals import accuracy
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.evaluation.wups import Wups, parts

MAX_NEW_TOKENS = 24
"""Longest answer; the longest lists have seven things."""


def questions(pairs: Path) -> list[Question]:
    """Return every question of the test split.

    Parameters
    ----------
    pairs
        ``qa.jsonl``, see :mod:`dynamic_llava.data.photographs`.
    """
    return [
        Question(
            partial(open_image, picture.path),
            text,
            reference,
            "short",
            name=str(picture.path),
            picture=picture.path.name,
        )
        for picture in questioned(pairs, "test")
        for text, reference in picture.questions
    ]


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Answer all questions greedily.

    An answer is right if it lists what the reference does, in any order, whatever its case.

    Returns
    -------
    dict
        ``accuracy`` with counts and interval, ``wups_0.9`` and ``wups_0.0`` in percent, the kept shares, and
        the answers as ``examples``.
    """
    kept, answers = Kept(), list[str]()
    for some in batches(asked, batch_size, "questions"):
        answers += answer(model, processor, some, kept, max_new_tokens)
    found = scores(answers, asked)
    return {
        **accuracy(sum(found["right"]), len(asked)),
        **{name: round(100 * fmean(found[name]), 3) for name in ("wups_0.9", "wups_0.0")},
        **kept.shares(),
        "examples": [
            {
                "image": question.picture,
                "question": question.text,
                "answer": text,
                "reference": question.answer,
                **{name: values[number] for name, values in found.items()},
            }
            for number, (question, text) in enumerate(zip(asked, answers, strict=True))
        ],
    }


def scores(answers: Sequence[str], asked: Sequence[Question]) -> dict[str, Any]:
    """Return ``right`` (bool), ``wups_0.9`` and ``wups_0.0`` of each answer."""
    pairs = [(text, question.answer) for text, question in zip(answers, asked, strict=True)]
    near, far = Wups(0.9), Wups(0.0)
    return {
        "right": [sorted(parts(text)) == sorted(parts(reference)) for text, reference in pairs],
        "wups_0.9": [near(*pair) for pair in pairs],
        "wups_0.0": [far(*pair) for pair in pairs],
    }
