"""What a recipe trains on, evaluates on and calibrates on, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import LlavaProcessor

from dynamic_llava.training import generated
from dynamic_llava.training.recipe import Recipe


@dataclass(frozen=True)
class Feed:
    """Data of one training: ``unseen`` is what the output predictor's threshold is set on."""

    train: Dataset[Any]
    sampler: Sampler[int]
    evaluation: Dataset[Any] | None
    unseen: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Any]]


def feed(recipe: Recipe, processor: LlavaProcessor) -> Feed:
    """Return the data that ``recipe`` names."""
    return _drawn(recipe, processor)


def _drawn(recipe: Recipe, processor: LlavaProcessor) -> Feed:
    steps = recipe.steps or 0
    train = generated.GeneratedSteps(recipe, processor, 0, steps)
    unseen = generated.GeneratedSteps(recipe, processor, steps, recipe.calibration_steps)
    evaluation = None
    if recipe.evaluation is not None:
        first = steps + recipe.calibration_steps
        evaluation = generated.GeneratedSteps(recipe, processor, first, recipe.evaluation.steps)
    return Feed(train, SequentialSampler(train), evaluation, unseen, generated.unwrap)
