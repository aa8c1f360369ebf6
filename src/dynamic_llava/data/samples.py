"""One picture with what is asked about it: the unit every data set of this library is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Turn:
    """A question about a picture, its answer, and the kind of question (``count``, ``description``, ...)."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Sample:
    """A picture, opened when needed, and independent turns about it."""

    name: str
    open_image: Callable[[], Image.Image]
    turns: tuple[Turn, ...]
