"""Droppable spans of a row, such as its answer.

Legend: B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One droppable span a row: its tokens, bool ``[B, N]``, and what is asked of its mask."""

    mask_BN: Tensor
    min_length: int
    keep_rate: float

    @property
    def is_long_B(self) -> Tensor:
        """Which rows are long enough to lose tokens."""
        return self.mask_BN.sum(-1) >= max(self.min_length, 1)

    def penalty(self, kept_BN: Tensor) -> Tensor:
        """Mean over rows of the squared distance to the keep rate; short rows count as 0."""
        kept_B = (kept_BN * self.mask_BN).sum(-1) / self.mask_BN.sum(-1).clamp(min=1)
        return ((self.keep_rate - kept_B).square() * self.is_long_B).mean()


def ordinals(answer_mask_BN: Tensor) -> Tensor:
    """Return the index of each answer token within its answer, int64 ``[B, N]``; meaningless elsewhere."""
    count_BN = answer_mask_BN.long().cumsum(-1)
    before_BN = count_BN.masked_fill(answer_mask_BN, 0).cummax(-1).values
    return count_BN - before_BN - 1
