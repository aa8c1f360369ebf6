"""What all stages have: a model ready to be trained, its objective, and how it is saved at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel, ProcessorMixin

from dynamic_llava import checkpoints
from dynamic_llava.sparsifier import sparsifier_of
from dynamic_llava.training.photo.features import give_features, release_tower
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.objective import Objective

Load = Callable[..., tuple[PreTrainedModel, ProcessorMixin]]


@dataclass(frozen=True)
class Stage(ABC):
    """A model ready to be trained."""

    recipe: Recipe
    objective: Objective
    model: LlavaForConditionalGeneration
    processor: LlavaProcessor

    @classmethod
    @abstractmethod
    def build(cls, recipe: Recipe, load: Load) -> Stage:
        """Load or make the model of the stage, and freeze what it does not train.

        Parameters
        ----------
        recipe
            What it says.
        load
            Loads the model that the stage starts from, with its weights or without.
        """

    def finish(self, unseen: Iterable[Mapping[str, Any]], folder: Path) -> None:
        """Write the finished model.

        Parameters
        ----------
        unseen
            Groups of rows that were not trained on, for what is set after training.
        """
        release_tower(self.model)
        self.model.to(getattr(torch, self.recipe.run.save_dtype))
        checkpoints.save(self.model, self.processor, folder)


def load_init(
    recipe: Recipe, load: Load
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, dict[str, Tensor] | None]:
    """Load the model to start from, which the recipe has made sure to name; freeze what is not trained.

    Returns
    -------
    model, processor, trained
        ``trained`` are the weights of the sparsifier that the model came with, which is taken off; or None.
    """
    dtype = getattr(torch, recipe.stage.init_dtype)
    loaded, processor = load(
        cast(str, recipe.stage.init), dtype=dtype, vision_tower=recipe.stage.vision_tower
    )
    model = cast(LlavaForConditionalGeneration, loaded)
    trained = _detached(model)
    model.model.vision_tower.requires_grad_(recipe.stage.train_vision_tower)
    model.model.multi_modal_projector.requires_grad_(recipe.stage.train_projector)
    model.get_input_embeddings().requires_grad_(recipe.stage.train_embeddings)
    if recipe.run.attention == "eager":
        model.set_attn_implementation({"text_config": "eager"})
    if recipe.data.photographs is not None:
        give_features(model)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, cast(LlavaProcessor, processor), trained


def _detached(model: LlavaForConditionalGeneration) -> dict[str, Tensor] | None:
    """Take off the sparsifier that a model came with; return its weights."""
    sparsifier = sparsifier_of(model)
    if sparsifier is None:
        return None
    sparsifier.detach()
    return sparsifier.state_dict()
