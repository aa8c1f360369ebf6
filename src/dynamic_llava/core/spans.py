"""Which tokens of a row may be dropped: those of its last question, and those of its answer.

Legend: B batch, N tokens, K pictures, I image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


def question_mask(
    token_ids_BN: Tensor | None, pictures: Sequence[Tensor], valid_BN: Tensor, marker: tuple[int, ...]
) -> Tensor:
    """Find the prompt tokens that may be dropped: the last question, all but its last token.

    It starts with the last ``marker`` after the row's pictures, or right after them where there is none (the
    official ``last_instruct`` span); a row without pictures has none.

    Parameters
    ----------
    token_ids_BN
        None where the prompt was given as embeddings: then no marker is looked for.
    pictures
        Where the tokens of each picture lie in the flattened ``[B * N]`` input, int64 ``[I]`` each.
    valid_BN
        Which tokens belong to the prompt: no padding, no answer.
    marker
        Token ids; may be empty.

    Returns
    -------
    Tensor
        Bool ``[B, N]``.
    """
    batch, length = valid_BN.shape
    column_N = torch.arange(length, device=valid_BN.device)
    if not pictures:
        return torch.zeros_like(valid_BN)
    last_K = torch.stack([picture_I[-1] for picture_I in pictures])
    row_K, column_K = last_K // length, last_K % length
    start_B = torch.full((batch,), length, device=valid_BN.device)
    start_B = start_B.scatter_reduce(0, row_K, column_K + 1, "amax", include_self=False)
    if token_ids_BN is not None and 0 < len(marker) <= length:
        wanted = torch.tensor(marker, device=valid_BN.device)
        found_BM = (token_ids_BN.unfold(1, len(marker), 1) == wanted).all(-1)
        found_BM &= valid_BN.unfold(1, len(marker), 1).all(-1)
        found_BM &= column_N[: found_BM.shape[1]] >= start_B[:, None]
        last_B = torch.where(found_BM, column_N[: found_BM.shape[1]], -1).amax(-1)
        start_B = torch.where(last_B >= 0, last_B, start_B)
    return but_last(valid_BN & (column_N >= start_B[:, None]), valid_BN)


def but_last(mask_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Take the last token of each row out of a mask."""
    column_N = torch.arange(valid_BN.shape[1], device=valid_BN.device)
    last_B1 = torch.where(valid_BN, column_N, -1).amax(-1, keepdim=True)
    return mask_BN & (column_N != last_B1)
