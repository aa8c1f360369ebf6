"""The vision stage: every patch learns to name the object that covers it, and its own place.

The place must be asked for: a tower that only names objects forgets where they are (a linear probe finds the
row of 32 % of the object patches, which is chance), and the decoder then cannot tell left from right.

It gives the tower the head start that LLaVA takes from CLIP. Legend: B pictures, I patches, A attributes,
K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.data import Sample, easy_vqa, scenes
from dynamic_llava.data.training import IGNORE

SHAPES = tuple(sorted({*scenes.SHAPES, *easy_vqa.SHAPES}))
COLORS = scenes.COLORS
SIZES = tuple(scenes.RADII)
OBJECT_DISTANCE = 60  # light backgrounds differ from every object by more, summed over RGB
OBJECT_SHARE = 0.15  # of a patch that an object must cover to be named there


class PatchHeads(nn.Module):
    """Linear classifiers of a patch: shape, colour, size (class 0: nothing there), row and column."""

    def __init__(self, hidden_size: int, side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.classes = nn.ModuleList(
            nn.Linear(hidden_size, classes)
            for classes in (1 + len(SHAPES), 1 + len(COLORS), 1 + len(SIZES), side, side)
        )

    def forward(self, features_BIC: Tensor) -> list[Tensor]:
        """Return the logits [B, I, K] of each attribute."""
        normed_BIC = self.norm(features_BIC)
        return [head(normed_BIC) for head in self.classes]


def patch_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Tower output that the projector reads, without the class token: [B, I, C]."""
    tower = model.model.vision_tower
    hidden_states = tower(pixel_values, output_hidden_states=True).hidden_states
    return cast(Tensor, hidden_states[model.config.vision_feature_layer][:, 1:])


def loss(logits: Sequence[Tensor], labels_BIA: Tensor) -> Tensor:
    """Sum over the attributes of the mean cross-entropy over labelled patches."""
    terms = [
        F.cross_entropy(logits_BIK.flatten(0, 1).float(), labels_BIA[..., i].flatten(), ignore_index=IGNORE)
        for i, logits_BIK in enumerate(logits)
    ]
    return torch.stack(terms).sum()


def accuracy(logits: Sequence[Tensor], labels_BIA: Tensor) -> float:
    """Share of object patches whose shape and colour are both named rightly."""
    right_BI = torch.stack([(logits[i].argmax(-1) == labels_BIA[..., i]) for i in (0, 1)]).all(0)
    labelled_BI = (labels_BIA[..., 0] > 0) & (labels_BIA[..., 1] > 0)
    return right_BI[labelled_BI].float().mean().item()


def scene_batch(indices: Sequence[int], processor: LlavaProcessor) -> tuple[Tensor, Tensor]:
    """Pixel values [B, 3, H, W] and patch labels [B, I, A] of training scenes."""
    drawn = [scenes.scene(index, "train") for index in indices]
    labels = [_scene_labels(scene, processor.patch_size) for scene in drawn]
    return _pixels([scene.draw() for scene in drawn], processor), torch.stack(labels)


def easy_vqa_batch(samples: Sequence[Sample], processor: LlavaProcessor) -> tuple[Tensor, Tensor]:
    """Pixel values [B, 3, H, W] and patch labels [B, I, A] of easy-VQA pictures, size unknown."""
    images = [sample.open_image() for sample in samples]
    side = processor.image_processor.size["height"]
    labels = [
        _easy_vqa_labels(sample, image, side, processor.patch_size)
        for sample, image in zip(samples, images, strict=True)
    ]
    return _pixels(images, processor), torch.stack(labels)


def _pixels(images: list[Image.Image], processor: LlavaProcessor) -> Tensor:
    return cast(Tensor, processor.image_processor(images, return_tensors="pt")["pixel_values"])


def _scene_labels(scene: scenes.Scene, patch: int) -> Tensor:
    cell_I = _cells(scenes.SIDE // patch)
    names_CA = torch.zeros(len(scenes.POSITIONS), 3, dtype=torch.long)
    for t in scene.things:
        names = (1 + SHAPES.index(t.shape), 1 + COLORS.index(t.color), 1 + SIZES.index(t.size))
        names_CA[t.cell] = torch.tensor(names)
    return _with_place(names_CA[cell_I], _covered(scene.draw(), patch))


def _easy_vqa_labels(sample: Sample, image: Image.Image, side: int, patch: int) -> Tensor:
    shape, color = easy_vqa.attributes(sample)
    known = [1 + SHAPES.index(shape) if shape else IGNORE, 1 + COLORS.index(color) if color else IGNORE]
    covered_I = _covered(image.resize((side, side), Image.Resampling.BICUBIC), patch)
    return _with_place(torch.tensor([[*known, IGNORE]]).expand(len(covered_I), 3), covered_I)


def _covered(image: Image.Image, patch: int) -> Tensor:
    """Which patches an object covers: bool [I]. The background is the picture's median colour."""
    pixels = np.asarray(image).astype(np.int64)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    object_HW = torch.from_numpy(np.abs(pixels - background).sum(-1) > OBJECT_DISTANCE)
    return F.avg_pool2d(object_HW.float()[None], patch).flatten() > OBJECT_SHARE


def _with_place(names_IA: Tensor, covered_I: Tensor) -> Tensor:
    """Names where an object is, 0 elsewhere; then the row and the column of every patch."""
    side = math.isqrt(len(covered_I))
    place_I2 = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return torch.cat([names_IA * covered_I[:, None], place_I2], dim=1)


def _cells(side: int) -> Tensor:
    """Cell of the scenes' 3 x 3 layout that each patch belongs to: [I]."""
    third = torch.arange(side) * 3 // side
    return (third[:, None] * 3 + third).flatten()
