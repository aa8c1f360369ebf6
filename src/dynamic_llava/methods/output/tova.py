"""TOVA (Oren et al., EMNLP 2024, arXiv 2401.06104): the least attended output token goes."""

from __future__ import annotations

from torch import Tensor

from dynamic_llava.methods.base import EvictingMethod, Held


class Tova(EvictingMethod):
    """Rank by the attention of the newest token alone; no token is exempt, itself included.

    The paper takes the mean over the heads of each layer and gives up different tokens in each; here the
    cache holds the same tokens in all sparse layers, so attention is summed over these.
    """

    def rank(self, held: Held, budget: int) -> Tensor:
        """Rank by what the newest token pays."""
        return held.newest_BS
