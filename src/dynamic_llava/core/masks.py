"""Who sees whom: bool visibility, and its form for the attention implementations.

Legend: B batch, N tokens, Q queries, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

DEFAULT_BLOCK = 128  # of flex attention, in queries and keys


def causal(length: int, device: torch.device) -> Tensor:
    """Return a bool ``[N, N]``: each token sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def with_diagonal(visible: Tensor) -> Tensor:
    """Let every query see itself, so that no row of the softmax is empty; ``visible`` is ``[..., N, N]``."""
    return visible | torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)


def visibility(attention_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Return who sees whom in a full-length pass.

    Parameters
    ----------
    attention_mask
        None, ``[B, N]`` (1 = token, 0 = padding) or a bool ``[B, 1, N, N]`` that is used as it is.
    length
        Number of tokens N.
    device
        Where the result is made.

    Returns
    -------
    Tensor
        Bool ``[B or 1, 1, N, N]``; a padding token may see nothing.
    """
    if attention_mask is None:
        return causal(length, device)[None, None]
    if attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool or attention_mask.shape[-2:] != (length, length):
            raise ValueError(
                f"attention_mask is {attention_mask.dtype} {tuple(attention_mask.shape)}: a 4-D mask must be "
                f"bool [batch, 1, {length}, {length}], True where a query sees a key"
            )
        return attention_mask
    return causal(length, device) & attention_mask.bool()[:, None, None, :]


def token_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return which of the last ``length`` columns are tokens: bool ``[B, N]``, or None where all are.

    Raises
    ------
    ValueError
        If the mask is not 2-D: dropping tokens needs to know them, not who sees whom.
    """
    if attention_mask is None:
        return None
    if getattr(attention_mask, "ndim", 0) != 2:
        raise ValueError(
            "attention_mask is no 2-D tensor [batch, tokens]: a model that drops tokens takes only those "
            "(4-D masks only with answer_mask, or as generate() makes them for a static cache)"
        )
    valid_BN = attention_mask[:, -length:].bool()
    return None if bool(valid_BN.all()) else valid_BN


def two_dimensional(attention_mask: Tensor | None, past: int, length: int) -> Tensor | None:
    """Return the 2-D mask behind a 4-D one that ``generate`` made for a static cache; others as they are.

    Parameters
    ----------
    attention_mask
        Anything; ``[B or 1, 1, N, slots]``, bool or additive, is taken back to int64 ``[B or 1, past + N]``
        if it is causal and padded and nothing more.
    past, length
        Tokens in the cache, and new ones N.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        return attention_mask
    is_bool = attention_mask.dtype == torch.bool
    sees_BNS = (attention_mask if is_bool else attention_mask == 0)[:, 0, :, : past + length]
    valid_BS = sees_BNS[:, -1]
    is_query_BN1 = valid_BS[:, past:, None]
    causal_NS = causal(past + length, valid_BS.device)[past:]
    if not torch.equal(sees_BNS & is_query_BN1, causal_NS & valid_BS[:, None] & is_query_BN1):
        return attention_mask
    return valid_BS.long()


def for_attention(visible: Tensor | None, queries: int, like: Tensor, implementation: str) -> Any:
    """Turn visibility into what an attention implementation takes.

    Parameters
    ----------
    visible
        Bool ``[B or 1, 1, Q, S]``; None stands for plain causal attention over ``queries`` keys (or one query
        that sees all keys).
    queries
        Number of queries Q.
    like
        A tensor of the dtype and device wanted.
    implementation
        ``"sdpa"`` takes bool masks and None, ``"eager"`` an additive mask, ``"flex_attention"`` a block mask.
    """
    if implementation == "sdpa":
        return visible
    if visible is None:
        if queries == 1:
            return None
        visible = causal(queries, like.device)[None, None]
    if implementation == "flex_attention":
        return block_mask(visible.expand(like.shape[0], -1, -1, -1))
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill_(~visible, torch.finfo(like.dtype).min)


def block_mask(visible: Tensor) -> BlockMask:
    """Turn visibility, bool ``[B, 1, Q, S]``, into flex attention's own form.

    An additive mask would do, but flex attention as compiled for CPUs corrupts memory with one (torch 2.13).
    """
    rows, _, queries, keys = visible.shape
    # Blocks are whole: what lies past the edges is asked for too.
    edges = (0, -keys % DEFAULT_BLOCK, 0, -queries % DEFAULT_BLOCK)
    whole = torch.nn.functional.pad(visible[:, 0], edges)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return whole[row, query, key]

    return create_block_mask(sees, rows, None, queries, keys, device=str(visible.device))
