"""Which pictures a step trains on: a pure function of the step, so that a resumed run sees the same data."""

from __future__ import annotations

import random

from dynamic_llava.data import Sample, easy_vqa, scenes


class Stream:
    """Draws training pictures: scenes never repeat, easy-VQA pictures come in shuffled epochs.

    Parameters
    ----------
    scenes_per_step, easy_vqa_per_step : int
        Pictures of each kind in one step.
    question_rounds : int
        How often every kind of question is asked about a scene.
    place_rounds : int
        How often those that ask for a place are asked on top.
    seed : int
        Offsets the scenes and shuffles easy-VQA.
    """

    def __init__(
        self, scenes_per_step: int, easy_vqa_per_step: int, question_rounds: int, place_rounds: int, seed: int
    ) -> None:
        self.scenes_per_step = scenes_per_step
        self.easy_vqa_per_step = easy_vqa_per_step
        self.question_rounds = question_rounds
        self.place_rounds = place_rounds
        self.seed = seed
        self._pictures = easy_vqa.load("train") if easy_vqa_per_step else []

    def scenes(self, step: int) -> list[int]:
        """Return the numbers of the training scenes of a step."""
        first = self.seed * 10_000_000 + step * self.scenes_per_step
        return list(range(first, first + self.scenes_per_step))

    def easy_vqa(self, step: int) -> list[Sample]:
        """Return the easy-VQA pictures of a step."""
        first = step * self.easy_vqa_per_step
        return [self._picture(first + offset) for offset in range(self.easy_vqa_per_step)]

    def groups(self, step: int) -> list[list[Sample]]:
        """Return the step's samples, scenes and easy-VQA apart: rows of a group have similar lengths."""
        rounds = self.question_rounds, self.place_rounds
        drawn = [scenes.make(index, "train", *rounds) for index in self.scenes(step)]
        return [group for group in (drawn, self.easy_vqa(step)) if group]

    def _picture(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self._pictures))
        order = list(range(len(self._pictures)))
        random.Random(f"easy-vqa-{self.seed}-{epoch}").shuffle(order)
        return self._pictures[order[place]]
