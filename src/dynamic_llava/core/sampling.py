"""Sampling the masks of a training pass (paper, eq. 5).

Legend: B batch, N tokens, A tokens of a span, aligned to the right, K pictures, I image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynamic_llava.core.decisions import Decisions, attention_to, same_size
from dynamic_llava.core.sampled import Sampled
from dynamic_llava.core.spans import Span, ordinals
from dynamic_llava.core.view import gather_tokens, right_align
from dynamic_llava.methods.base import Draw, OutputMethod, Outputs


def sample(
    decisions: Decisions,
    hidden_BNC: Tensor,
    pictures: Sequence[Tensor],
    answer_mask_BN: Tensor,
    prompt_mask_BN: Tensor | None,
    attention: Sequence[Tensor],
    noise: Callable[[Tensor], Tensor],
) -> Sampled:
    """Return the masks of a training pass.

    Image tokens and the tokens marked by ``answer_mask_BN`` and ``prompt_mask_BN`` get straight-through
    masks; answers and questions shorter than their minimal length and everything else get ones.
    ``pictures`` and ``attention`` are those of ``decisions.keep_image_tokens``.
    """
    config, rates, tau = decisions.config, decisions.train_rates, decisions.tau
    answers = Span(answer_mask_BN, config.min_answer_length, config.text_keep_rate)
    text_mask_BN = torch.ones_like(answer_mask_BN, dtype=torch.float32)
    if config.sparsify_text:
        draw = Draw(tau, noise, None if rates is None else rates.text)
        text_mask_BN = _sample_span(decisions.text_method, decisions.outputs, hidden_BNC, answers, draw)
    questions, prompt_mask = None, None
    if config.sparsify_prompt and prompt_mask_BN is not None:
        questions = Span(prompt_mask_BN, config.min_prompt_length, config.prompt_keep_rate)
        draw = Draw(tau, noise)
        prompt_mask = _sample_span(decisions.text_method, decisions.questions, hidden_BNC, questions, draw)
    image_masks: list[Tensor] = [
        hidden_BNC.new_ones(len(picture_I), dtype=torch.float32) for picture_I in pictures
    ]
    if config.sparsify_image:
        draw = Draw(tau, noise, None if rates is None else rates.image)
        for group in same_size(pictures):
            hidden_KIC = hidden_BNC.flatten(0, 1)[torch.stack([pictures[k] for k in group])]
            asked = decisions.pictures(hidden_KIC, attention_to(group, attention))
            mask_KI = decisions.image_method.weigh(asked, draw).float()
            for number, mask_I in zip(group, mask_KI, strict=True):
                image_masks[number] = mask_I
    rate = config.image_keep_rate if config.sparsify_image else None
    return Sampled(text_mask_BN, answers, prompt_mask, questions, pictures, image_masks, rate)


def _sample_span(
    method: OutputMethod,
    asked: Callable[[Tensor, Tensor], Outputs],
    hidden_BNC: Tensor,
    span: Span,
    draw: Draw,
) -> Tensor:
    """Mask of one droppable span a row, float32 ``[B, N]``; 1 outside and in short spans."""
    index_BA, valid_BA = right_align(span.mask_BN)
    ordinal_BA = ordinals(span.mask_BN).gather(1, index_BA)
    hidden_BAC = gather_tokens(hidden_BNC, index_BA)
    mask_BA = method.weigh(asked(hidden_BAC, ordinal_BA), valid_BA, draw).float()
    droppable_BA = valid_BA & span.is_long_B[:, None]
    ones_BN = torch.ones_like(span.mask_BN, dtype=torch.float32)
    return ones_BN.scatter(1, index_BA, torch.where(droppable_BA, mask_BA, 1.0))
