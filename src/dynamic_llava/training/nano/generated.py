"""Nano's training data: drawn scenes and easy-VQA pictures, a step's worth an item."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from dynamic_llava.training.nano import patches
from dynamic_llava.training.nano.packing import Packer
from dynamic_llava.training.nano.stream import Stream
from dynamic_llava.training.recipe import Drawn

Groups = list[dict[str, Tensor]]


class GeneratedSteps(Dataset[Groups]):
    """Each item is all that one step trains on, in groups of rows of similar length.

    Parameters
    ----------
    drawn
        How many pictures of each kind.
    processor
        Supplies the tokenizer and the image processor.
    seed
        Changes all pictures.
    is_vision
        Give labels of patches instead of questions and answers.
    first, count
        The steps: from 0 for training, those after them for what must be unseen.
    """

    def __init__(
        self, drawn: Drawn, processor: LlavaProcessor, seed: int, is_vision: bool, first: int, count: int
    ) -> None:
        self.first = first
        self.count = count
        self.is_vision = is_vision
        self.processor = processor
        self.packer = Packer(processor, drawn.short_answer_weight)
        self.stream = Stream(
            drawn.scenes_per_step,
            drawn.easy_vqa_per_step,
            drawn.question_rounds,
            drawn.place_rounds,
            seed,
        )

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.count

    def __getitem__(self, item: int) -> Groups:
        """Return the groups of a step."""
        if not 0 <= item < self.count:
            raise IndexError(item)
        step = self.first + item
        return self._patches(step) if self.is_vision else self._turns(step)

    def _turns(self, step: int) -> Groups:
        groups, number = [], 0
        for samples in self.stream.groups(step):
            groups.append(self.packer(samples, range(number, number + len(samples))))
            number += len(samples)
        return groups

    def _patches(self, step: int) -> Groups:
        batches = []
        if indices := self.stream.scenes(step):
            batches.append(patches.scene_batch(indices, self.processor))
        if samples := self.stream.easy_vqa(step):
            batches.append(patches.easy_vqa_batch(samples, self.processor))
        return [{"pixel_values": pixels, "labels": labels_BIA} for pixels, labels_BIA in batches]


def unwrap(items: list[Groups]) -> dict[str, Any]:
    """Collate: an item is a batch already."""
    (groups,) = items
    return {"groups": groups}
