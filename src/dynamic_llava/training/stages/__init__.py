"""The stages of training, each in a file of its name: the model to start from, the objective, the end."""

from __future__ import annotations

from dynamic_llava import checkpoints
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.align import AlignStage
from dynamic_llava.training.stages.base import Load, Stage
from dynamic_llava.training.stages.dense import DenseStage
from dynamic_llava.training.stages.dynamic import DynamicStage
from dynamic_llava.training.stages.vision import VisionStage

__all__ = ["Stage", "build"]

STAGES: dict[str, type[Stage]] = {
    "vision": VisionStage,
    "align": AlignStage,
    "dense": DenseStage,
    "dynamic": DynamicStage,
}


def build(recipe: Recipe, load: Load = checkpoints.load_with_processor) -> Stage:
    """Load or make the model of the recipe's stage, and freeze what it does not train.

    ``load`` may be :func:`~dynamic_llava.checkpoints.load_skeleton`, for a look at it without its weights.
    """
    return STAGES[recipe.stage.name].build(recipe, load)
