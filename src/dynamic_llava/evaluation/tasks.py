"""What a model is asked: the easy-VQA test split, held-out scenes, and descriptions of held-out scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from PIL import Image

from dynamic_llava.data import Sample, easy_vqa, scenes

HELD_OUT_SCENES = 500
"""Held-out scenes that a task asks about unless it is limited; there is no end to them."""


@dataclass(frozen=True)
class Question:
    """One question on one picture with its reference answer and its kind.

    ``earlier`` holds the questions and reference answers of the turns before it; errors call it ``name``.
    ``references`` holds all reference answers where there are several; ``picture`` is the picture's name.
    """

    open_image: Callable[[], Image.Image]
    text: str
    answer: str
    kind: str
    earlier: tuple[tuple[str, str], ...] = ()
    name: str = "the question"
    references: tuple[str, ...] = ()
    picture: str = ""


def easy_vqa_test() -> list[Question]:
    """Return all 9,673 questions of the easy-VQA test split."""
    return _flatten(easy_vqa.load("test"))


def scene_questions(count: int = HELD_OUT_SCENES) -> list[Question]:
    """Return every short question on ``count`` held-out scenes."""
    return [question for question in _held_out(count) if question.kind != "description"]


def scene_descriptions(count: int = HELD_OUT_SCENES) -> list[Question]:
    """Return requests to describe ``count`` held-out scenes."""
    return [question for question in _held_out(count) if question.kind == "description"]


TASKS: dict[str, Callable[[], list[Question]]] = {
    "easy-vqa": easy_vqa_test,
    "scenes": scene_questions,
    "descriptions": scene_descriptions,
}


def questions(task: str, limit: int | None) -> list[Question]:
    """Return the questions of a task, at most ``limit`` of them.

    Raises
    ------
    ValueError
        There is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    return list(islice(TASKS[task](), limit))


def _held_out(count: int) -> list[Question]:
    return _flatten([scenes.make(index, "heldout") for index in range(count)])


def _flatten(samples: list[Sample]) -> list[Question]:
    return [
        Question(sample.open_image, turn.question, turn.answer, turn.kind, name=sample.name)
        for sample in samples
        for turn in sample.turns
    ]
