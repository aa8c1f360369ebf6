"""The masks that training samples: what each token weighs as a key, and what its keep rate costs.

Legend: B batch, K pictures, I image tokens, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamic_llava.core.spans import Span


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
