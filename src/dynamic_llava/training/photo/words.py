"""What the projector is aligned to: the words of a picture's captions, as the language model embeds them.

Legend: K pictures, W words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from dynamic_llava.data.photographs import Photograph, captioned
from dynamic_llava.training.photo.features import Look
from dynamic_llava.training.photo.stream import PhotoStream

PICTURES_AT_LEAST = 15  # that a word must be said about
COMMON = 0.35  # share of the pictures above which a word says nothing
WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Words:
    """Words that are one token, by its id, and the share of the pictures that each is said about."""

    places: dict[str, int]
    ids: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, pictures: Sequence[Photograph], tokenizer: PreTrainedTokenizerBase) -> Words:
        """Choose the words of ``pictures`` that name something."""
        said = Counter(word for picture in pictures for word in _words(picture))
        chosen: dict[str, int] = {}
        for word, count in sorted(said.items()):
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            if count >= PICTURES_AT_LEAST and count < COMMON * len(pictures) and len(ids) == 1:
                chosen[word] = ids[0]
        places = {word: place for place, word in enumerate(chosen)}
        shares = tuple(said[word] / len(pictures) for word in chosen)
        return cls(places, tuple(chosen.values()), shares)

    def labels(self, picture: Photograph) -> Tensor:
        """Return the share of a picture's captions that say each word, float32 [W]."""
        labels_W = torch.zeros(len(self.ids))
        for caption in picture.captions:
            for word in set(WORD.findall(caption.lower())) & self.places.keys():
                labels_W[self.places[word]] += 1 / len(picture.captions)
        return labels_W


class WordSteps(Dataset[list[dict[str, Tensor]]]):
    """A step's pictures, by their cached features, and the words said about each; see `PhotoSteps`."""

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
        # Those of the training captions, also where the pictures are others.
        self.words = Words.of(captioned(stream.data.captions, "train"), processor.tokenizer)
        self.tokens = tokens
        self.first = first
        self.count = count

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.count

    def __getitem__(self, item: int) -> list[dict[str, Tensor]]:
        """Return the only group of a step."""
        if not 0 <= item < self.count:
            raise IndexError(item)
        drawn = self.stream.pictures(self.first + item)
        paths, mirrored = [picture.path for picture, _ in drawn], [flag for _, flag in drawn]
        labels_KW = torch.stack([self.words.labels(picture) for picture, _ in drawn])
        return [{"pixel_values": self.features(paths, mirrored, self.tokens), "labels": labels_KW}]


def _words(picture: Photograph) -> set[str]:
    return {word for caption in picture.captions for word in WORD.findall(caption.lower())}
