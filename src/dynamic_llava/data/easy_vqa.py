"""The easy-VQA set (Victor Zhou, MIT licence): pictures of one shape, from the package ``easy-vqa``."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Literal

from dynamic_llava.chat.images import open_image
from dynamic_llava.data.samples import Sample, Turn

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")


def load(split: Literal["train", "test"]) -> list[Sample]:
    """Read one split: every picture with all its questions (train 4,000 / 38,575; test 1,000 / 9,673).

    Raises
    ------
    ImportError
        If the ``easy-vqa`` package is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "easy-VQA needs the package easy-vqa: pip install 'dynamic-llava[train]'"
        ) from error
    if split == "train":
        questions, answers, picture_ids = easy_vqa.get_train_questions()
        paths = easy_vqa.get_train_image_paths()
    else:
        questions, answers, picture_ids = easy_vqa.get_test_questions()
        paths = easy_vqa.get_test_image_paths()
    turns: dict[int, list[Turn]] = defaultdict(list)
    for question, answer, picture in zip(questions, answers, picture_ids, strict=True):
        turns[picture].append(Turn(question, answer, _kind(answer)))
    return [
        Sample(f"easy-vqa/{split}/{picture}", partial(open_image, paths[picture]), tuple(rows))
        for picture, rows in sorted(turns.items())
    ]


def attributes(sample: Sample) -> tuple[str, str]:
    """Shape and colour of a picture's only object, read from the answers; "" where none says."""
    answers = {turn.answer for turn in sample.turns}
    shape = next((name for name in SHAPES if name in answers), "")
    color = next((name for name in COLORS if name in answers), "")
    return shape, color


def _kind(answer: str) -> str:
    if answer in SHAPES:
        return "shape"
    return "color" if answer in COLORS else "yes/no"
