"""What a recipe trains on, evaluates on and calibrates on, and in which order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import LlavaProcessor, PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.positions import positions_of
from dynamic_llava.data.conversations import Conversations
from dynamic_llava.data.training import ConversationDataset, LengthGrouped, collate
from dynamic_llava.training import recipe as recipes
from dynamic_llava.training.nano import generated
from dynamic_llava.training.photo.features import Blank, Features
from dynamic_llava.training.photo.steps import PhotoSteps
from dynamic_llava.training.photo.stream import PhotoStream
from dynamic_llava.training.photo.words import WordSteps
from dynamic_llava.training.recipe import Recipe


@dataclass(frozen=True)
class Feed:
    """Data of one training.

    Attributes
    ----------
    order
        Returns the order of ``train``, given the number of processes that share a step.
    unseen
        What the output predictor's threshold is set on.
    """

    train: Dataset[Any]
    order: Callable[[int], Sampler[int]]
    evaluation: Dataset[Any] | None
    unseen: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Any]]


def feed(recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin) -> Feed:
    """Return the data that ``recipe`` names, for a model, whose tower looks at photographs beforehand."""
    if recipe.data.drawn is not None:
        return _drawn(recipe, recipe.data.drawn, cast(LlavaProcessor, processor))
    if recipe.data.photographs is not None:
        return _photographs(recipe, recipe.data.photographs, model, cast(LlavaProcessor, processor))
    read = functools.partial(_dataset, processor=processor, positions=positions_of(model.config))
    return _conversations(recipe, cast(recipes.Conversations, recipe.data.conversations), processor, read)


def _conversations(
    recipe: Recipe,
    data: recipes.Conversations,
    processor: ProcessorMixin,
    read: Callable[[recipes.Conversations], ConversationDataset],
) -> Feed:
    train = read(data)

    def order(processes: int) -> Sampler[int]:
        return LengthGrouped(
            train.lengths, recipe.data.batch_size * recipe.data.accumulate * processes, recipe.run.seed
        )

    evaluation = None
    if recipe.evaluation is not None and recipe.evaluation.conversations is not None:
        evaluation = read(recipe.evaluation.conversations)
    pad = processor.tokenizer.pad_token_id
    if pad is None:
        pad = processor.tokenizer.eos_token_id
    return Feed(train, order, evaluation, evaluation or train, functools.partial(collate, pad=pad))


def _dataset(
    data: recipes.Conversations, processor: ProcessorMixin, positions: int | None
) -> ConversationDataset:
    return ConversationDataset(
        Conversations(data.path, data.images, data.on_error),
        processor,
        answers=data.answers,
        max_length=data.max_length,
        positions=positions,
        on_error=data.on_error,
        limit=data.limit,
    )


def _drawn(recipe: Recipe, drawn: recipes.Drawn, processor: LlavaProcessor) -> Feed:
    make = functools.partial(
        generated.GeneratedSteps, drawn, processor, recipe.run.seed, recipe.stage.name == "vision"
    )
    steps = recipe.run.steps or 0
    train = make(0, steps)
    unseen = make(steps, recipe.calibration_steps)
    evaluation = None
    if recipe.evaluation is not None:
        first = steps + recipe.calibration_steps
        evaluation = make(first, recipe.evaluation.steps)
    return Feed(train, lambda processes: SequentialSampler(train), evaluation, unseen, generated.unwrap)


def _photographs(
    recipe: Recipe, data: recipes.Photographs, model: PreTrainedModel, processor: LlavaProcessor
) -> Feed:
    """Train on the split ``train``; what must be unseen comes from ``val``."""
    steps = WordSteps if recipe.stage.name == "align" else PhotoSteps

    def made(split: str, first: int, count: int) -> Any:
        stream = PhotoStream(data, recipe.run.seed, split)
        looks = Blank if model.device.type == "meta" else Features
        features = looks(data.features, stream.paths, cast(Any, model), processor)
        return steps(stream, features, processor, data.image_tokens, first, count)

    train = made("train", 0, recipe.run.steps or 0)
    unseen = made("val", 0, recipe.calibration_steps)
    evaluation = None
    if recipe.evaluation is not None:
        evaluation = made("val", recipe.calibration_steps, recipe.evaluation.steps)
    return Feed(train, lambda processes: SequentialSampler(train), evaluation, unseen, generated.unwrap)
