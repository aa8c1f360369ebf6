"""What an answer cost that was measured: FLOPs of its prompts and of its decoding, sparse and dense.

Legend: T output tokens of a turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs.decisions import image_decision_flops, output_decision_flops, text_decision_flops
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.costs.step import Step


def answer_flops(
    config: SparsityConfig,
    shape: DecoderShape,
    steps: Sequence[Step],
    answers: Sequence[Sequence[Tensor]],
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
        After each prompt and in each row which output tokens stayed, bool ``[T]``; may be fewer than the
        prompts.
    has_cache
        Whether a step sees what earlier ones left.
    """
    sparse, dense = _decision_flops(config, shape.hidden, steps, answers), 0.0
    for row in range(len(steps[0].dense_B) if steps else 0):
        sparse_layer, dense_layer = _layer_flops(config, shape, steps, answers, has_cache, row)
        dense += shape.layers * dense_layer
        sparse += config.layer * dense_layer
        sparse += (shape.layers - config.layer) * sparse_layer
    return sparse, dense


def decode_layer_flops(
    config: SparsityConfig, shape: DecoderShape, kept_T: Tensor, past: int, held: int
) -> tuple[float, float]:
    """Return the FLOPs of decoding an answer with a cache in one sparse and in one dense layer.

    Parameters
    ----------
    config, shape
        What is dropped, and by which decoder.
    kept_T
        Which of its tokens are held at its end, bool; a token sees itself whether it stays or not.
    past, held
        Tokens before it that the dense layer and the sparse layer hold.
    """
    tokens = len(kept_T)
    if tokens == 0:
        return 0.0, 0.0
    before_T = kept_T.long().cumsum(0) - kept_T.long()
    if config.sparsify_text:
        method = methods.output_method(config.text_policy, config.text_options)
        before_T = method.held_before(kept_T, config.text_keep_rate)
    sparse = shape.layer_flops(tokens, held + before_T.double().mean().item() + 1)
    return sparse, shape.layer_flops(tokens, past + (tokens + 1) / 2)


def _decision_flops(
    config: SparsityConfig, hidden_size: int, steps: Sequence[Step], answers: Sequence[Sequence[Tensor]]
) -> float:
    sizes = [size for step in steps for size in step.scored]
    scoring = sum(image_decision_flops(config, hidden_size, size) for size in sizes)
    judging = sum(step.judged for step in steps) * text_decision_flops(config, hidden_size)
    fed_back = sum(len(kept_T) for rows in answers for kept_T in rows)
    return scoring + judging + fed_back * output_decision_flops(config, hidden_size)


def _layer_flops(
    config: SparsityConfig,
    shape: DecoderShape,
    steps: Sequence[Step],
    answers: Sequence[Sequence[Tensor]],
    has_cache: bool,
    row: int,
) -> tuple[float, float]:
    """FLOPs of one sparse and of one dense layer for one row."""
    past = held = 0
    sparse = dense = 0.0
    for step, rows in itertools.zip_longest(steps, answers):
        queries, kept = int(step.dense_B[row]), int(step.sparse_B[row])
        dense += shape.layer_flops(queries, past + queries)
        sparse += shape.layer_flops(kept, held + kept)
        if not has_cache:
            continue
        past, held = past + queries, held + int(step.held_B[row])
        if rows is not None:
            sparse_answer, dense_answer = decode_layer_flops(config, shape, rows[row], past, held)
            sparse, dense = sparse + sparse_answer, dense + dense_answer
            past, held = past + len(rows[row]), held + int(rows[row].sum())
    return sparse, dense
