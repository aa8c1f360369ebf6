"""Structured dropping: evenly spaced tokens stay."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_llava.methods.base import Policy


def evenly_spaced(index: Tensor, rate: float) -> Tensor:
    """Return a bool like ``index``: of the first n indices, exactly ``int(n * rate)`` are True."""
    index = index.double()
    return ((index + 1) * rate).floor() > (index * rate).floor()


class UniformPolicy(Policy):
    """Keep tokens at a fixed stride.

    Parameters
    ----------
    image_rate, text_rate
        Keep rates in (0, 1].
    """

    def __init__(self, image_rate: float, text_rate: float) -> None:
        self.image_rate = image_rate
        self.text_rate = text_rate

    def score(self, hidden_KIC: Tensor) -> Tensor:
        """Score 1 at the stride, 0 elsewhere."""
        pictures, tokens, _ = hidden_KIC.shape
        index_I = torch.arange(tokens, device=hidden_KIC.device)
        return evenly_spaced(index_I, self.image_rate).float().expand(pictures, -1)

    def keep(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Keep at the stride, counted from the start of the answer."""
        return evenly_spaced(ordinal_BN, self.text_rate)
