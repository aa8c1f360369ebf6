"""The dense stage: visual instruction tuning, nothing sparse.

Legend: B rows, N tokens, A labelled tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamic_llava.data.training import IGNORE, model_inputs
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.base import Load, Stage, load_init
from dynamic_llava.training.stages.objective import Group, Objective, label_weights


class DenseStage(Stage):
    """Trains projector and decoder of a dense model."""

    @classmethod
    def build(cls, recipe: Recipe, load: Load) -> DenseStage:
        """See the base class."""
        model, processor, trained = load_init(recipe, load)
        if trained is not None:
            raise ValueError(f"{recipe.stage.init}: init has a sparsifier, which the dense stage would lose")
        return cls(recipe, DenseObjective(model), model, processor)


class DenseObjective(Objective):
    """Visual instruction tuning, nothing sparse."""

    def forward(self, groups: Sequence[Group], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class."""
        losses = [cross_entropy(self.logits(group), group) for group in groups]
        return torch.stack(losses).sum() / totals[0], {}

    def logits(self, group: Group, **masks: Tensor) -> Tensor:
        """Return the logits ``[A, V]`` that predict the labelled tokens, and no others: they are large."""
        model = cast(Any, self.model)
        inputs = model_inputs(group)
        if model.config.get_text_config()._attn_implementation == "eager":
            inputs["attention_mask"] = additive(inputs["attention_mask"])
        hidden_BNC = model.model(**inputs, use_cache=False, **masks).last_hidden_state
        hidden_AC = hidden_BNC[:, :-1][group["labels"][:, 1:] != IGNORE]
        return cast(Tensor, model.get_output_embeddings()(hidden_AC))


def additive(mask: Tensor) -> Tensor:
    """Return a packed mask [B, 1, N, N] as eager attention adds it to scores; one of padding [B, N] stays."""
    if mask.ndim == 2:
        return mask
    dtype = torch.bfloat16  # holds both values, and does not widen scores of 16 bits
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def cross_entropy(logits_AV: Tensor, group: Group) -> Tensor:
    """Cross-entropy of the labelled tokens, summed with their weights."""
    labels_BN = group["labels"][:, 1:]
    losses_A = F.cross_entropy(logits_AV.float(), labels_BN[labels_BN != IGNORE], reduction="none")
    return (losses_A * label_weights(group)).sum() if "weights" in group else losses_A.sum()
