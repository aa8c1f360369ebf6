"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): image tokens that get little attention go."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from dynamic_llava.methods.base import ImageMethod, Pictures


class FastV(ImageMethod):
    """Rank by the attention that the last prompt token pays, in the last dense layer, mean over heads."""

    reads_attention = True

    def score(self, pictures: Pictures) -> Tensor:
        """Return the attention, as the official code does."""
        return cast(Tensor, pictures.attention_KI)
