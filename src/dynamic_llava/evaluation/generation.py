"""The paper's generation table on any long answers: dense and sparse side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.evaluation.batches import check_lengths
from dynamic_llava.evaluation.descriptions import Setting, by_length, measure_setting
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.sparsifier import sparsifier_of

MAX_NEW_TOKENS = 1024
"""Longest generated answer unless told otherwise, as in the official METEOR script."""


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Measure ``dense``, and ``sparse`` where the model has a sparsifier; see `measure_setting`.

    Raises
    ------
    ValueError
        A question and its answer are longer than the model's positions.
    """
    check_lengths(model, processor, questions, max_new_tokens)
    settings = [Setting("dense", None)]
    if sparsifier_of(model) is not None:
        settings.append(Setting("sparse"))
    ordered = by_length(questions)
    return {
        setting.name: measure_setting(model, processor, ordered, batch_size, setting, max_new_tokens)
        for setting in settings
    }
