"""Image tokens stay by chance: the baseline that every method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_llava.methods.base import ImageMethod, Pictures
from dynamic_llava.methods.chance import IMAGE_STREAM, hashed_uniform


class Random(ImageMethod):
    """Keep the same tokens for the same seed, whatever else is in the batch."""

    def score(self, pictures: Pictures) -> Tensor:
        """Return a fixed random score for each index within a picture."""
        count, tokens, _ = pictures.hidden_KIC.shape
        index_I = torch.arange(tokens, device=pictures.hidden_KIC.device)
        return hashed_uniform(index_I, pictures.seed, IMAGE_STREAM).expand(count, -1)
