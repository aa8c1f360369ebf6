"""``photo``'s training data: photographs by their cached features, a step's worth an item."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from dynamic_llava.training.photo.features import Look
from dynamic_llava.training.photo.packing import TreePacker
from dynamic_llava.training.photo.stream import PhotoStream

Groups = list[dict[str, Tensor]]


class PhotoSteps(Dataset[Groups]):
    """Each item is all that one step trains on, one group of rows.

    Parameters
    ----------
    stream
        Chooses the pictures.
    features
        Has seen them.
    processor
        Supplies the tokenizer and the chat template.
    tokens
        Image tokens of a picture.
    first, count
        The steps: from 0 for training, those after them for what must be unseen.
    """

    def __init__(
        self,
        stream: PhotoStream,
        features: Look,
        processor: LlavaProcessor,
        tokens: int,
        first: int,
        count: int,
    ) -> None:
        self.stream = stream
        self.features = features
        self.packer = TreePacker(processor, tokens)
        self.first = first
        self.count = count

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.count

    def __getitem__(self, item: int) -> Groups:
        """Return the only group of a step."""
        if not 0 <= item < self.count:
            raise IndexError(item)
        rows = self.stream.rows(self.first + item)
        shown = [row for row in rows if row.path is not None]
        paths, mirrored = [row.path for row in shown if row.path], [row.mirrored for row in shown]
        return [self.packer(rows, self.features(paths, mirrored, self.packer.tokens))]
