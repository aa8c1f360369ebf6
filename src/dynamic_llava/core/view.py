"""The index through which sparse layers see the tokens.

Legend: B batch, N tokens, L kept tokens (padded), C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def right_align(keep_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the kept tokens of each row lie, aligned to the right.

    Parameters
    ----------
    keep_BN
        Bool; the rows may keep different numbers of tokens.

    Returns
    -------
    index_BL, valid_BL
        Source position of each kept token in its original order (int64), and which of these columns are
        tokens and not padding (bool). L is the longest row's count.
    """
    length = int(keep_BN.sum(-1).max())
    order_BN = keep_BN.to(torch.uint8).argsort(dim=-1, stable=True)
    index_BL = order_BN[:, order_BN.shape[1] - length :]
    return index_BL, keep_BN.gather(1, index_BL)


def ordinals(answer_mask_BN: Tensor) -> Tensor:
    """Return the index of each answer token within its answer, int64 ``[B, N]``; meaningless elsewhere."""
    count_BN = answer_mask_BN.long().cumsum(-1)
    before_BN = count_BN.masked_fill(answer_mask_BN, 0).cummax(-1).values
    return count_BN - before_BN - 1


def gather_tokens(x_BNC: Tensor, index_BL: Tensor) -> Tensor:
    """Return ``x_BNC`` at ``index_BL``: ``[B, L, C]``."""
    return x_BNC.gather(1, index_BL[..., None].expand(-1, -1, x_BNC.shape[-1]))
