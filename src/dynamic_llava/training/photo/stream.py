"""Which photographs a step trains on, and what it asks about them: a pure function of the step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dynamic_llava.data import photographs
from dynamic_llava.data.conversations import Conversations
from dynamic_llava.data.photographs import Photograph
from dynamic_llava.training.photo.packing import Asked, Shown
from dynamic_llava.training.recipe import Photographs

QUESTIONS_AT_ONCE = 3  # of one picture: such a row is as long as one of five captions
LEFT_RIGHT = ("left", "right")
T = TypeVar("T")


class PhotoStream:
    """Draws photographs in shuffled epochs, kind by kind.

    Parameters
    ----------
    data
        Files, splits and how many of each kind a step has.
    seed
        Shuffles.
    split
        Of the pictures; questions are asked in ``train`` alone, for DAQUAR has no other split but its test.
    """

    def __init__(self, data: Photographs, seed: int, split: str) -> None:
        self.data = data
        self.seed = seed
        self.captioned = photographs.captioned(data.captions, split)
        self.questioned: list[Photograph] = []
        if split == "train" and data.questions is not None and data.questions_per_step:
            self.questioned = photographs.questioned(data.questions, split)
        self.texts = Conversations(data.texts) if data.texts is not None else []

    def pictures(self, step: int) -> list[tuple[Photograph, bool]]:
        """Return the captioned pictures of a step, and whether each is mirrored."""
        drawn = [self._captions(step, place) for place in range(self.data.captions_per_step)]
        return [(photograph, shown.mirrored) for photograph, shown in drawn]

    @property
    def paths(self) -> list[list[Path]]:
        """Every picture that can be drawn, by set."""
        sets = [self.captioned, self.questioned]
        return [[photograph.path for photograph in pictures] for pictures in sets if pictures]

    def rows(self, step: int) -> list[Shown]:
        """Return the rows of a step; their lengths are similar."""
        data = self.data
        return [
            *(self._captions(step, place)[1] for place in range(data.captions_per_step)),
            *(self._description(step, place) for place in range(data.descriptions_per_step)),
            *(self._questions(step, place) for place in range(data.questions_per_step) if self.questioned),
            *(self._text(step, place) for place in range(data.texts_per_step)),
        ]

    def _captions(self, step: int, place: int) -> tuple[Photograph, Shown]:
        photograph = self._drawn("captions", self.captioned, step * self.data.captions_per_step + place)
        draw = self._draw("captions", step, place)
        asked = Asked(draw.choice(photographs.CAPTION_REQUESTS), photograph.captions)
        return photograph, Shown(photograph.path, _may_mirror(photograph.captions, draw), (asked,))

    def _description(self, step: int, place: int) -> Shown:
        number = step * self.data.descriptions_per_step + place
        photograph = self._drawn("descriptions", self.captioned, number)
        draw = self._draw("descriptions", step, place)
        sentences = list(photograph.captions)
        draw.shuffle(sentences)
        asked = Asked(draw.choice(photographs.DESCRIPTION_REQUESTS), (" ".join(sentences),), long=True)
        return Shown(photograph.path, _may_mirror(photograph.captions, draw), (asked,))

    def _questions(self, step: int, place: int) -> Shown:
        photograph = self._drawn("questions", self.questioned, step * self.data.questions_per_step + place)
        draw = self._draw("questions", step, place)
        turns = draw.sample(photograph.questions, min(QUESTIONS_AT_ONCE, len(photograph.questions)))
        asked = tuple(Asked(question, (answer,)) for question, answer in turns)
        return Shown(photograph.path, _may_mirror([question for question, _ in turns], draw), asked)

    def _text(self, step: int, place: int) -> Shown:
        conversation = self._drawn("texts", self.texts, step * self.data.texts_per_step + place)
        ((question, answer), *_) = conversation.turns
        return Shown(None, False, (Asked(question, (answer,)),))

    def _draw(self, kind: str, step: int, place: int) -> random.Random:
        return random.Random(f"{kind}-{self.seed}-{step}-{place}")

    def _drawn(self, kind: str, pictures: Sequence[T], position: int) -> T:
        epoch, place = divmod(position, len(pictures))
        order = list(range(len(pictures)))
        random.Random(f"{kind}-{self.seed}-epoch-{epoch}").shuffle(order)
        return pictures[order[place]]


def _may_mirror(texts: Sequence[str], draw: random.Random) -> bool:
    """Mirror every second picture, but none whose text tells left from right."""
    return draw.random() < 0.5 and not any(side in text.lower() for text in texts for side in LEFT_RIGHT)
