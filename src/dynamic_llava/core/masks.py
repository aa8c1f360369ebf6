"""Stock masks taken apart: which tokens are no padding, who sees whom, and what one query sees.

Legend: B batch, N tokens, M columns of a stock mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dynamic_llava.core.blocks import hide_in_blocks
from dynamic_llava.core.view import first_column


def is_token(mask: Any, batch: int, fed: int, past: int, device: torch.device) -> Tensor | None:
    """Return which new tokens are no padding, by a stock mask's own diagonal.

    Parameters
    ----------
    mask
        What a stock layer gets: bool or additive ``[B or 1, 1, N, M]``, 2-D, or a block mask.
    batch, fed, past
        Rows B, new tokens N of each, and the columns fed before them.
    device
        Where the result is made.

    Returns
    -------
    Tensor or None
        Bool ``[B, N]``; None where all are.
    """
    query_N = torch.arange(fed, device=device)
    column_N = query_N + (past - first_column(mask, past, fed, None))
    if isinstance(mask, BlockMask):
        row_B1 = torch.arange(batch, device=device)[:, None]
        valid_BN = mask.mask_mod(row_B1, torch.zeros_like(row_B1), query_N[None], column_N[None])
    elif mask.ndim == 4:
        valid_BN = _is_seen(mask[:, 0, query_N.to(mask.device), column_N.to(mask.device)])
    else:
        valid_BN = mask[:, -fed:].bool()
    valid_BN = valid_BN.to(device).expand(batch, -1)
    return None if bool(valid_BN.all()) else valid_BN


def causal(length: int, device: torch.device) -> Tensor:
    """Return a bool ``[N, N]``: each token sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def visible(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """Return who sees whom in a pass at full length, every token at least itself: bool ``[B or 1, 1, N, N]``.

    ``mask`` is what a stock layer gets, None or as for :func:`is_token`.
    """
    own_NN = torch.eye(length, dtype=torch.bool, device=device)
    if mask is None:
        return causal(length, device)[None, None]
    if isinstance(mask, BlockMask):
        row = torch.arange(batch, device=device)[:, None, None, None]
        column_N = torch.arange(length, device=device)
        return mask.mask_mod(row, torch.zeros_like(row), column_N[:, None], column_N) | own_NN
    if mask.ndim == 2:
        return (causal(length, device) & mask.bool()[:, None, None]) | own_NN
    return _is_seen(mask) | own_NN


def seen_by(mask: Any, query_B: Tensor, fed: int) -> Tensor | None:
    """Return which keys one of the ``fed`` queries of each row sees: bool ``[B, M]``; None without a mask.

    ``mask`` is what a stock layer gets, None or as for :func:`is_token`.
    """
    if mask is None:
        return None
    batch, columns = len(query_B), mask.shape[-1]
    row_B, column_M = torch.arange(batch, device=query_B.device), torch.arange(columns, device=query_B.device)
    if isinstance(mask, BlockMask):
        row_B1 = row_B[:, None]
        return mask.mask_mod(row_B1, torch.zeros_like(row_B1), query_B[:, None], column_M)
    if mask.ndim == 2:
        return mask.bool() & (column_M <= query_B[:, None] + columns - fed)
    return _is_seen(mask.expand(batch, -1, -1, -1)[row_B, 0, query_B])


def hide(mask: Any, keep_BN: Tensor) -> Any:
    """Hide the keys of tokens that are not kept from all other queries, in a stock mask of a full pass.

    ``mask`` is any that :func:`is_token` takes but a 2-D one, which cannot say that a token sees only itself.
    """
    batch, length = keep_BN.shape
    if isinstance(mask, BlockMask):
        return hide_in_blocks(mask, keep_BN)
    seen = visible(mask, batch, length, keep_BN.device)
    own_NN = torch.eye(length, dtype=torch.bool, device=keep_BN.device)
    seen = (seen & keep_BN[:, None, None]) | own_NN
    return _formed(seen, mask)


def _formed(sees: Tensor, like: Tensor | None) -> Tensor:
    """Return a bool mask in the form of a stock one: bool, or additive."""
    if like is None or like.dtype == torch.bool:
        return sees
    return torch.zeros_like(sees, dtype=like.dtype).masked_fill_(~sees, torch.finfo(like.dtype).min)


def _is_seen(mask: Tensor) -> Tensor:
    """Return a 4-D mask, bool or additive, as bool."""
    return mask if mask.dtype == torch.bool else mask == 0
