"""What an answer cost that was measured: FLOPs of its prompts and of its decoding, sparse and dense.

Legend: B batch, T output tokens of a turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs.flops import image_predictor_flops, text_predictor_flops
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.costs.step import Step


def answer_flops(
    config: SparsityConfig,
    shape: DecoderShape,
    steps: Sequence[Step],
    answers: Sequence[Tensor],
    has_cache: bool,
) -> tuple[float, float]:
    """Return the FLOPs of ``steps`` and of decoding ``answers``, sparse (with predictors) and dense.

    Parameters
    ----------
    config, shape
        What was dropped, and by which decoder.
    steps
        The prompts of a conversation; without a cache every pass.
    answers
        After each prompt which output tokens stayed, bool ``[B, T]``; may be fewer than the prompts.
    has_cache
        Whether a step sees what earlier ones left.
    """
    sparse, dense = _predictor_flops(config, shape, steps, answers), 0.0
    for row in range(len(steps[0].dense_B) if steps else 0):
        sparse_layer, dense_layer = _layer_flops(config, shape, steps, answers, has_cache, row)
        dense += shape.layers * dense_layer
        sparse += config.layer * dense_layer
        sparse += (shape.layers - config.layer) * sparse_layer
    return sparse, dense


def _predictor_flops(
    config: SparsityConfig, shape: DecoderShape, steps: Sequence[Step], answers: Sequence[Tensor]
) -> float:
    total = 0.0
    if config.image_policy == "learned":
        sizes = [size for step in steps for size in step.scored]
        total += sum(image_predictor_flops(config, shape.hidden, size) for size in sizes)
    if config.text_policy == "learned":
        judged = sum(step.judged for step in steps)
        if config.sparsify_text:
            judged += sum(kept_BT.numel() for kept_BT in answers)
        total += judged * text_predictor_flops(config, shape.hidden)
    return total


def _layer_flops(
    config: SparsityConfig,
    shape: DecoderShape,
    steps: Sequence[Step],
    answers: Sequence[Tensor],
    has_cache: bool,
    row: int,
) -> tuple[float, float]:
    """FLOPs of one sparse and of one dense layer for one row."""
    past = held = 0
    sparse = dense = 0.0
    for step, kept_BT in itertools.zip_longest(steps, answers):
        queries, kept = int(step.dense_B[row]), int(step.sparse_B[row])
        dense += shape.layer_flops(queries, past + queries)
        sparse += shape.layer_flops(kept, held + kept)
        if not has_cache:
            continue
        past, held = past + queries, held + int(step.held_B[row])
        if kept_BT is not None and (tokens := kept_BT.shape[1]):
            seen = held + methods.held_before(config, kept_BT[row]).double().mean().item() + 1
            dense += shape.layer_flops(tokens, past + (tokens + 1) / 2)
            sparse += shape.layer_flops(tokens, seen)
            past, held = past + tokens, held + int(kept_BT[row].sum())
    return sparse, dense
