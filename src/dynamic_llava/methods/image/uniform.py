"""Evenly spaced image tokens stay."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_llava.methods.base import ImageMethod, Pictures
from dynamic_llava.methods.spacing import evenly_spaced


class Uniform(ImageMethod):
    """Keep tokens at a fixed stride."""

    def score(self, pictures: Pictures) -> Tensor:
        """Score 1 at the stride, 0 elsewhere."""
        count, tokens, _ = pictures.hidden_KIC.shape
        index_I = torch.arange(tokens, device=pictures.hidden_KIC.device)
        return evenly_spaced(index_I, pictures.rate).float().expand(count, -1)
