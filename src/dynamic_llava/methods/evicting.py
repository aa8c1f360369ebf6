"""Methods that give up earlier output tokens: a budget that grows with the answer, and who goes at its end.

The prompt always stays, as under every method for output tokens.

Legend: B batch, S slots of the cache.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamic_llava.methods.base import Policy

SINKS = 4  # StreamingLLM, section 3.2


@dataclass(frozen=True)
class Held:
    """The output tokens in the cache, the newest among them.

    ``ordinal_BS`` is the index within the answer of the token in each slot; ``is_output_BS`` tells which
    slots hold one; ``mass_BS`` is the attention that each has received, summed over steps and sparse layers.
    """

    ordinal_BS: Tensor
    is_output_BS: Tensor
    mass_BS: Tensor


class EvictingPolicy(Policy):
    """Hold at most ``ceil(rate * t)`` of the t output tokens so far; needs a K/V cache.

    Parameters
    ----------
    rate
        Share of the output tokens held, in (0, 1].
    """

    name = ""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def budget(self, fed: int) -> int:
        """Return how many of ``fed`` output tokens may be held."""
        return max(1, math.ceil(self.rate * fed))

    def evict(self, held: Held) -> Tensor:
        """Return the slot to give up in each row, -1 where none needs to be: int64 ``[B]``."""
        ordinal_BS = torch.where(held.is_output_BS, held.ordinal_BS, -1)
        fed = int(ordinal_BS.amax()) + 1  # the newest token is the same for every row
        budget = self.budget(fed)
        rank_BS = self.rank(ordinal_BS, held.mass_BS, budget).masked_fill(~held.is_output_BS, torch.inf)
        is_over_B = held.is_output_BS.sum(-1) > budget
        return torch.where(is_over_B, rank_BS.argmin(-1), -1)

    @abstractmethod
    def rank(self, ordinal_BS: Tensor, mass_BS: Tensor, budget: int) -> Tensor:
        """Return numbers ``[B, S]``: of a full row, the output token with the least goes."""

    def score(self, hidden_KIC: Tensor) -> Tensor:
        """Refuse: these methods are about output tokens."""
        raise ValueError(f"{self.name} ranks no image tokens: choose another image_policy")

    def keep(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Refuse: what stays is not known when a token is decoded."""
        raise ValueError(
            f"text_policy {self.name!r} gives up earlier tokens, which only decoding with a K/V cache can: "
            "leave out use_cache=False and answer_mask, or choose another policy"
        )


class StreamingPolicy(EvictingPolicy):
    """StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): the first output tokens and the recent."""

    name = "streaming"

    def rank(self, ordinal_BS: Tensor, mass_BS: Tensor, budget: int) -> Tensor:
        """Let the oldest go that is no sink; the newest where there are only sinks."""
        ordinal_BS = ordinal_BS.double()
        return torch.where(
            ordinal_BS < SINKS, ordinal_BS.amax(-1, keepdim=True) + SINKS - ordinal_BS, ordinal_BS
        )


class H2OPolicy(EvictingPolicy):
    """H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): half recent, half those with the most attention.

    The cache holds the same tokens in all sparse layers and heads, so attention is summed over them; the
    official code gives up different tokens in each.
    """

    name = "h2o"

    def rank(self, ordinal_BS: Tensor, mass_BS: Tensor, budget: int) -> Tensor:
        """Let the least attended go that is not among the recent half."""
        recent = max(1, budget // 2)
        is_recent_BS = ordinal_BS > ordinal_BS.amax(-1, keepdim=True) - recent
        return mass_BS.double().masked_fill(is_recent_BS, torch.finfo(torch.float64).max)
