"""Random dropping: the baseline that every method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_llava.methods.base import Policy

IMAGE_STREAM, TEXT_STREAM = 1, 2  # keep the draws for image tokens and output tokens apart


def hashed_uniform(index: Tensor, seed: int) -> Tensor:
    """Return numbers in [0, 1), a pure function of ``index`` and ``seed`` (splitmix64's mixer)."""
    x = index.long() + (seed * 0x9E3779B97F4A7C15 + 1) % 2**63
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - 2**64)
    x = x ^ ((x >> 31) & (2**33 - 1))
    return (x & (2**53 - 1)).double() / 2**53


class RandomPolicy(Policy):
    """Keep tokens by chance: the same tokens for the same seed, whatever else is in the batch.

    Parameters
    ----------
    text_rate
        Keep rate of output tokens in (0, 1].
    seed
        Seed of the draws.
    """

    def __init__(self, text_rate: float, seed: int) -> None:
        self.text_rate = text_rate
        self.seed = seed

    def score(self, hidden_KIC: Tensor) -> Tensor:
        """Return a fixed random score for each index within a picture."""
        pictures, tokens, _ = hidden_KIC.shape
        index_I = torch.arange(tokens, device=hidden_KIC.device)
        return hashed_uniform(index_I, 4 * self.seed + IMAGE_STREAM).expand(pictures, -1)

    def keep(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Keep with probability ``text_rate``."""
        return hashed_uniform(ordinal_BN, 4 * self.seed + TEXT_STREAM) < self.text_rate
