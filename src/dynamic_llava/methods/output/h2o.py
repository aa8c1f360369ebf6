"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): recent output tokens stay, and the most attended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamic_llava.methods.base import EvictingMethod, Held


@dataclass(frozen=True)
class H2O(EvictingMethod):
    """Give up the least attended token that is not recent.

    The cache holds the same tokens in all sparse layers and heads, so attention is summed over them; the
    official code gives up different tokens in each.

    Parameters
    ----------
    recent
        Share of the budget that is for the recent tokens, at least one token.
    """

    recent: float = 0.5

    def rank(self, held: Held, budget: int) -> Tensor:
        """Rank by the attention received, the recent above all."""
        recent = max(1, int(budget * self.recent))
        newest_B1 = held.ordinal_BS.masked_fill(~held.is_output_BS, -1).amax(-1, keepdim=True)
        is_recent_BS = held.ordinal_BS > newest_B1 - recent
        return held.mass_BS.double().masked_fill(is_recent_BS, torch.finfo(torch.float64).max)
