"""What a method of dropping tokens must answer.

Legend: B batch, K pictures, I image tokens, N tokens, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from dynamic_llava.methods.top_k import keep_count, top_k_mask


class Policy(ABC):
    """Score image tokens and decide on output tokens; a new method overrides these two."""

    @abstractmethod
    def score(self, hidden_KIC: Tensor) -> Tensor:
        """Return scores ``[K, I]`` of the image tokens of each picture; the highest are kept."""

    @abstractmethod
    def keep(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Decide which output tokens stay in the K/V cache: bool ``[B, N]``.

        ``ordinal_BN`` is its index within its answer; 0 is the first generated token.
        """

    def train_image_mask(self, hidden_KIC: Tensor, rate: float, tau: float) -> Tensor:
        """Return the 0/1 mask ``[K, I]`` that training weighs keys with: without parameters, the decision."""
        scores_KI = self.score(hidden_KIC)
        return top_k_mask(scores_KI, keep_count(scores_KI.shape[1], rate)).to(hidden_KIC.dtype)

    def train_text_mask(self, hidden_BNC: Tensor, ordinal_BN: Tensor, valid_BN: Tensor, tau: float) -> Tensor:
        """Return the 0/1 mask ``[B, N]`` that training weighs keys with: without parameters, the decision.

        ``valid_BN`` tells output tokens from padding, whose mask does not count.
        """
        return self.keep(hidden_BNC, ordinal_BN).to(hidden_BNC.dtype)
