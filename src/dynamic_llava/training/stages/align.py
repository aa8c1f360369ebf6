"""The align stage of photo: each patch, projected, learns to resemble the words said about its picture.

It costs minutes and spares the dense stage hours: the language model then reads patches as words it knows.

Legend: K pictures, I patches, C channels, W words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamic_llava.data import photographs
from dynamic_llava.training.photo.words import Words
from dynamic_llava.training.recipe import Photographs, Recipe
from dynamic_llava.training.stages.base import Load, Stage, load_init
from dynamic_llava.training.stages.objective import Group, Objective

SCALE = 10.0  # of cosines, at the start


class AlignStage(Stage):
    """Trains the projector alone."""

    @classmethod
    def build(cls, recipe: Recipe, load: Load) -> AlignStage:
        """See the base class."""
        model, processor, _ = load_init(recipe, load)
        captions = cast(Photographs, recipe.data.photographs).captions
        words = Words.of(photographs.captioned(captions, "train"), processor.tokenizer)
        return cls(recipe, AlignObjective(model, words), model, processor)

    def finish(self, unseen: Iterable[Mapping[str, Any]], folder: Path) -> None:
        """Give projected patches the size and the mean of the embeddings, and write the model."""
        objective = cast(AlignObjective, self.objective)
        with torch.no_grad():
            patches = torch.cat([objective.patches(group).flatten(0, 1) for group in unseen])
            embeddings_VC = cast(nn.Embedding, self.model.get_input_embeddings()).weight
            mean_C = embeddings_VC.mean(0)
            size = (embeddings_VC - mean_C).square().mean().sqrt() / patches.square().mean().sqrt()
            last = cast(nn.Linear, self.model.model.multi_modal_projector.linear_2)
            last.weight *= size
            last.bias.mul_(size).add_(mean_C)
        super().finish(unseen, folder)


class AlignObjective(Objective):
    """Which words are said about a picture, judged by the patches that resemble each most."""

    named_WC: Tensor

    def __init__(self, model: PreTrainedModel, words: Words) -> None:
        super().__init__(model)
        model.requires_grad_(False)
        cast(Any, model).model.multi_modal_projector.requires_grad_(True)
        embeddings_VC = cast(nn.Embedding, model.get_input_embeddings()).weight.detach()
        shares_W = torch.tensor(words.shares)
        named_WC = embeddings_VC[torch.tensor(words.ids)] - embeddings_VC.mean(0)
        self.register_buffer("named_WC", F.normalize(named_WC, dim=-1), persistent=False)
        self.scale = nn.Parameter(torch.tensor(SCALE).log())
        self.bias_W = nn.Parameter(shares_W.logit())

    def patches(self, group: Group) -> Tensor:
        """Return the projected patches, [K, I, C]."""
        return cast(Tensor, cast(Any, self.model).model.multi_modal_projector(group["pixel_values"][:, 1:]))

    def forward(self, groups: Sequence[Group], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; ``labels`` are shares of captions, float32 [K, W]."""
        loss = totals.new_zeros(())
        for group in groups:
            cosine_KIW = F.normalize(self.patches(group), dim=-1) @ self.named_WC.T
            resembled_KIW = self.scale.exp() * cosine_KIW.float()
            seen_KW = resembled_KIW.logsumexp(1) - math.log(resembled_KIW.shape[1])
            logits_KW = seen_KW + self.bias_W
            loss = loss + F.binary_cross_entropy_with_logits(logits_KW, group["labels"], reduction="sum")
        return loss / totals[1], {}
