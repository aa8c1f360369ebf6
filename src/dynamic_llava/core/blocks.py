"""Masks of flex attention, which are functions: the slots seen through the stock function of columns.

Legend: B batch, N tokens, L queries, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

BLOCK = 128  # in queries and keys


def block_mask(
    stock: BlockMask, index_BL: Tensor | None, fed: int, column_BS: Tensor, valid_BS: Tensor
) -> BlockMask:
    """Return who sees whom among the slots, by who sees whom among the columns.

    Parameters
    ----------
    stock
        The mask of the columns.
    index_BL
        Which of the ``fed`` stock queries each query is, int64; None where all are, as they are.
    column_BS, valid_BS
        The column of each slot, int64, and which slots hold a token.
    """
    batch, slots = column_BS.shape
    query_BL = torch.arange(fed, device=column_BS.device).expand(batch, -1) if index_BL is None else index_BL
    queries = query_BL.shape[1]
    edge = (0, -slots % BLOCK)  # blocks are whole: what lies past the edges is asked for too
    query_BL = nn.functional.pad(query_BL, (0, -queries % BLOCK))
    column_BS, valid_BS = nn.functional.pad(column_BS, edge), nn.functional.pad(valid_BS, edge)
    of_columns = stock.mask_mod

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return valid_BS[row, key] & of_columns(row, head, query_BL[row, query], column_BS[row, key])

    return create_block_mask(sees, batch, None, queries, slots, device=str(column_BS.device))


def hide_in_blocks(stock: BlockMask, keep_BN: Tensor) -> BlockMask:
    """Hide the keys of tokens that are not kept from all but their own query."""
    batch, length = keep_BN.shape
    padded_BN = nn.functional.pad(keep_BN, (0, -length % BLOCK))
    of_tokens = stock.mask_mod

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (of_tokens(row, head, query, key) & padded_BN[row, key]) | (query == key)

    return create_block_mask(sees, batch, None, length, length, device=str(keep_BN.device))
