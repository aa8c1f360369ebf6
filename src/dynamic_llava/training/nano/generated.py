"""Nano's training data: drawn scenes and easy-VQA pictures, a step's worth an item."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from dynamic_llava.training.nano import patches
from dynamic_llava.training.nano.packing import Packer
from dynamic_llava.training.nano.stream import Stream
from dynamic_llava.training.recipe import Recipe

Groups = list[dict[str, Tensor]]


class GeneratedSteps(Dataset[Groups]):
    """Each item is all that one step trains on, in groups of rows of similar length.

    Parameters
    ----------
    recipe
        How many pictures of each kind.
    processor
        Supplies the tokenizer and the image processor.
    first, count
        The steps: 0 to ``recipe.steps`` for training, those after it for what must be unseen.
    """

    def __init__(self, recipe: Recipe, processor: LlavaProcessor, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.is_vision = recipe.stage == "vision"
        self.processor = processor
        self.packer = Packer(processor, recipe.short_answer_weight)
        self.stream = Stream(
            recipe.scenes_per_step,
            recipe.easy_vqa_per_step,
            recipe.question_rounds,
            recipe.place_rounds,
            recipe.seed,
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
