"""The masks that training samples: what each token weighs as a key, and what its keep rate costs.

Legend: B batch, K pictures, I image tokens, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamic_llava import methods
from dynamic_llava.core.decisions import Decisions, attention_to, same_size
from dynamic_llava.core.question import prompt_method
from dynamic_llava.core.spans import Span, ordinals
from dynamic_llava.core.view import gather_tokens, right_align


@dataclass(frozen=True)
class Sampled:
    """The straight-through masks of one training pass, float32, with their gradients.

    Parameters
    ----------
    text_mask_BN, answer_span
        Masks of all tokens, 1 where no method decided, and which of them are output tokens.
    prompt_mask_BN, prompt_span
        The same for prompt tokens; None where these are not dropped.
    pictures
        Where the tokens of each picture lie in the flattened ``[B * N]`` input.
    image_masks
        A mask for each picture; none where a call has no pictures.
    image_keep_rate
        What is asked of them; None where image tokens are not dropped.
    """

    text_mask_BN: Tensor
    answer_span: Span
    prompt_mask_BN: Tensor | None = None
    prompt_span: Span | None = None
    pictures: Sequence[Tensor] = ()
    image_masks: Sequence[Tensor] = ()
    image_keep_rate: float | None = None

    def key_weights_BN(self) -> Tensor:
        """Return the weight of each key, float32 ``[B, N]``."""
        weights_BN = self.text_mask_BN
        if self.prompt_mask_BN is not None:
            weights_BN = weights_BN * self.prompt_mask_BN
        if not self.pictures:
            return weights_BN
        flat = weights_BN.flatten().scatter(
            0, torch.cat(list(self.pictures)), torch.cat(list(self.image_masks))
        )
        return flat.view_as(weights_BN)

    def ratio_losses(self, sparsify_text: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image, text and prompt penalty, before ``ratio_weight`` (paper, eq. 9 and 10)."""
        none = self.text_mask_BN.new_zeros(())
        image = text = prompt = none
        if self.image_keep_rate is not None and self.image_masks:
            kept_K = torch.stack([mask_I.mean() for mask_I in self.image_masks])
            image = (self.image_keep_rate - kept_K).square().mean()
        if sparsify_text:
            text = self.answer_span.penalty(self.text_mask_BN)
        if self.prompt_mask_BN is not None and self.prompt_span is not None:
            prompt = self.prompt_span.penalty(self.prompt_mask_BN)
        return image, text, prompt


@dataclass
class RecordedNoise:
    """Draws noise once, and the same again where gradient checkpointing runs a pass a second time.

    Parameters
    ----------
    draw
        Draws noise in the shape of what it is given.
    """

    draw: Callable[[Tensor], Tensor]
    drawn: list[Tensor] = field(default_factory=list)
    place: int = 0

    def rewind(self) -> None:
        """Begin again with the first draw."""
        self.place = 0

    def __call__(self, like: Tensor) -> Tensor:
        """Return the next draw."""
        if self.place == len(self.drawn):
            self.drawn.append(self.draw(like))
        self.place += 1
        return self.drawn[self.place - 1]


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
    config = decisions.config
    answers = Span(answer_mask_BN, config.min_answer_length, config.text_keep_rate)
    text_mask_BN = torch.ones_like(answer_mask_BN, dtype=torch.float32)
    if config.sparsify_text:
        text_mask_BN = _sample_span(decisions.tau, hidden_BNC, answers, decisions.text_method(noise))
    questions, prompt_mask = None, None
    if config.sparsify_prompt and prompt_mask_BN is not None:
        questions = Span(prompt_mask_BN, config.min_prompt_length, config.prompt_keep_rate)
        prompt_mask = _sample_span(decisions.tau, hidden_BNC, questions, prompt_method(decisions, noise))
    image_masks: list[Tensor] = [
        hidden_BNC.new_ones(len(picture_I), dtype=torch.float32) for picture_I in pictures
    ]
    if config.sparsify_image:
        for group in same_size(pictures):
            hidden_KIC = hidden_BNC.flatten(0, 1)[torch.stack([pictures[k] for k in group])]
            policy = decisions.image_method(attention_to(group, attention), noise)
            mask_KI = policy.train_image_mask(hidden_KIC, config.image_keep_rate, decisions.tau).float()
            for number, mask_I in zip(group, mask_KI, strict=True):
                image_masks[number] = mask_I
    rate = config.image_keep_rate if config.sparsify_image else None
    return Sampled(text_mask_BN, answers, prompt_mask, questions, pictures, image_masks, rate)


def _sample_span(tau: float, hidden_BNC: Tensor, span: Span, policy: methods.Policy) -> Tensor:
    """Mask of one droppable span a row, float32 ``[B, N]``; 1 outside and in short spans."""
    index_BA, valid_BA = right_align(span.mask_BN)
    ordinal_BA = ordinals(span.mask_BN).gather(1, index_BA)
    hidden_BAC = gather_tokens(hidden_BNC, index_BA)
    mask_BA = policy.train_text_mask(hidden_BAC, ordinal_BA, valid_BA, tau).float()
    droppable_BA = valid_BA & span.is_long_B[:, None]
    ones_BN = torch.ones_like(span.mask_BN, dtype=torch.float32)
    return ones_BN.scatter(1, index_BA, torch.where(droppable_BA, mask_BA, 1.0))
