"""The vision stage of nano: every patch learns to name what covers it.

Legend: B pictures, I patches, A attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamic_llava.training import nano
from dynamic_llava.training.nano import patches
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.base import Load, Stage
from dynamic_llava.training.stages.objective import Group, Objective


class VisionStage(Stage):
    """Makes nano from nothing and trains its tower."""

    @classmethod
    def build(cls, recipe: Recipe, load: Load) -> VisionStage:
        """See the base class."""
        processor = nano.build_processor()
        model = nano.build_model(processor, recipe.run.seed)
        features = model.model.multi_modal_projector.linear_1.in_features
        heads = patches.PatchHeads(features, side=nano.IMAGE_SIDE // nano.PATCH_SIDE)
        return cls(recipe, VisionObjective(model, heads), model, processor)


class VisionObjective(Objective):
    """The tower names what covers each patch; the rest of the model is left alone."""

    def __init__(self, model: PreTrainedModel, heads: patches.PatchHeads) -> None:
        super().__init__(model)
        self.heads = heads
        model.requires_grad_(False)
        cast(Any, model).model.vision_tower.requires_grad_(True)

    def forward(self, groups: Sequence[Group], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; ``labels`` are those of patches, int64 [B, I, A]."""
        pixel_values = torch.cat([group["pixel_values"] for group in groups])
        labels_BIA = torch.cat([group["labels"] for group in groups])
        logits = self.heads(patches.patch_features(cast(Any, self.model), pixel_values))
        share = patches.accuracy(logits, labels_BIA)
        loss = patches.loss(logits, labels_BIA) * len(labels_BIA) / totals[2]
        return loss, {"accuracy": torch.tensor([share * len(labels_BIA), len(labels_BIA)])}
