"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): the first output tokens stay, and the recent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamic_llava.methods.base import EvictingMethod, Held


@dataclass(frozen=True)
class Streaming(EvictingMethod):
    """Give up the oldest token that is no sink; the newest where there are only sinks.

    Parameters
    ----------
    sinks
        How many of the first output tokens always stay (section 3.2 has 4).
    """

    sinks: int = 4

    def rank(self, held: Held, budget: int) -> Tensor:
        """Rank by age, the sinks above all."""
        ordinal_BS = held.ordinal_BS.masked_fill(~held.is_output_BS, -1).double()
        above_B1 = ordinal_BS.amax(-1, keepdim=True) + self.sinks
        return torch.where(ordinal_BS < self.sinks, above_B1 - ordinal_BS, ordinal_BS)
