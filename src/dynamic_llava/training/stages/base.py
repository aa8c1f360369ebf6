"""What all stages have: a model ready to be trained, its objective, and how it is saved at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedModel, ProcessorMixin

from dynamic_llava import checkpoints
from dynamic_llava.families import family_of
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
    model: PreTrainedModel
    processor: ProcessorMixin

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
        if self.recipe.data.photographs is not None:
            release_tower(cast(Any, self.model))
        self.model.to(getattr(torch, self.recipe.run.save_dtype))
        checkpoints.save(self.model, self.processor, folder)


def load_init(recipe: Recipe, load: Load) -> tuple[PreTrainedModel, ProcessorMixin, dict[str, Tensor] | None]:
    """Load the model to start from, which the recipe has made sure to name; freeze what is not trained.

    Returns
    -------
    model, processor, trained
        ``trained`` are the weights of the sparsifier that the model came with, which is taken off; or None.
    """
    dtype = getattr(torch, recipe.stage.init_dtype)
    source = cast(str, recipe.stage.init)
    model, processor = load(source, dtype=dtype, vision_tower=recipe.stage.vision_tower)
    _check_data(recipe, processor)
    trained = _detached(model)
    base, family = model.base_model, family_of(model)
    base.get_submodule(family.tower).requires_grad_(recipe.stage.train_vision_tower)
    for name in family.projectors:  # after the tower, for some of them are parts of it
        base.get_submodule(name).requires_grad_(recipe.stage.train_projector)
    model.get_input_embeddings().requires_grad_(recipe.stage.train_embeddings)
    if recipe.run.attention == "eager":
        model.set_attn_implementation({"text_config": "eager"})
    if recipe.data.photographs is not None:
        give_features(cast(Any, model))
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, processor, trained


def _check_data(recipe: Recipe, processor: ProcessorMixin) -> None:
    """Refuse what is made in the layout of LLaVA-1.5 alone."""
    kind = next((name for name in ("drawn", "photographs") if getattr(recipe.data, name) is not None), None)
    if kind is not None and not isinstance(processor, LlavaProcessor):
        raise ValueError(
            f"data.{kind} makes rows for LLaVA-1.5 alone, and {recipe.stage.init} has a "
            f"{type(processor).__name__}: give data.conversations"
        )


def _detached(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Take off the sparsifier that a model came with; return its weights."""
    sparsifier = sparsifier_of(model)
    if sparsifier is None:
        return None
    sparsifier.detach()
    return sparsifier.state_dict()
