"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): image tokens that get little attention go."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_llava.methods.base import Policy


class FastVPolicy(Policy):
    """Rank image tokens by the attention that the last prompt token pays them; keep every output token.

    Parameters
    ----------
    attention_KI
        That attention in the last dense layer, mean over heads, as in the official code.
    """

    def __init__(self, attention_KI: Tensor) -> None:
        self.attention_KI = attention_KI

    def score(self, hidden_KIC: Tensor) -> Tensor:
        """Return the attention."""
        return self.attention_KI

    def keep(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Keep all: FastV drops nothing while decoding."""
        return torch.ones_like(ordinal_BN, dtype=torch.bool)
