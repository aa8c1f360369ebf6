"""A call that goes on with a filled cache: its mask, and slots made even before more than one token comes.

Legend: B batch, N columns of what was fed, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dynamic_llava.core.cache import Context, SparseLayer
from dynamic_llava.core.slots import Slots
from dynamic_llava.core.view import MASK


def with_all_columns(kwargs: Mapping[str, Any], context: Context) -> Any:
    """Return the mask of a call with the columns that were left out.

    A mask may be for all that was fed or for the new tokens alone; without one, padding is remembered.
    """
    mask, slots = kwargs.get(MASK), context.slots
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    new = cast(Tensor, embeds if ids is None else ids).shape[1]
    if mask is None:
        columns = cast(int, context.capacity) if slots.is_static else slots.fed + new
        return slots.is_token_BN(columns).long()
    if mask.shape[1] == slots.fed + new:
        return mask
    if mask.shape[1] != new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns: {slots.fed} tokens were fed before and {new} "
            f"are new, so give {slots.fed + new}, or {new} for the new ones alone"
        )
    return torch.cat([slots.is_token_BN(slots.fed).to(mask), mask], dim=1)


def hide(slots: Slots, seen_BN: Tensor) -> None:
    """Make fed tokens that a later mask no longer shows padding; bool ``[B, columns]``."""
    if bool(seen_BN.all()):
        return
    slots.padding.append((0, seen_BN))
    slots.valid_BS &= seen_BN.gather(1, slots.column_BS.clamp(max=seen_BN.shape[1] - 1))
    slots.is_full = False


def make_even(context: Context) -> None:
    """Align what is held to the right, so that rows are even again."""
    from_BS = pack(context.slots)
    for layer in context.layers:
        _move(layer, from_BS)


def pack(slots: Slots) -> Tensor:
    """Align the slots that hold a token to the right; return where each slot was: ``[B, S]``."""
    longest = int(slots.tokens_B().max())
    order_BS = slots.valid_BS.to(torch.uint8).argsort(dim=-1, stable=True)
    from_BS = order_BS[:, slots.capacity - longest :]
    column_BS, valid_BS = slots.column_BS.gather(1, from_BS), slots.valid_BS.gather(1, from_BS)
    slots.valid_BS.zero_()
    slots.column_BS[:, :longest], slots.valid_BS[:, :longest] = column_BS, valid_BS
    slots.length_B.fill_(longest)
    slots.is_even, slots.is_full = True, bool(valid_BS.all())
    slots.used = slots.looked = slots.capacity if slots.is_static else longest
    return from_BS


def _move(layer: SparseLayer, from_BS: Tensor) -> None:
    """Move what lies at ``from_BS`` to the first slots."""
    from_BS = from_BS.to(layer.keys.device)
    for storage_BHSD in (layer.keys, layer.values):
        _, heads, _, size = storage_BHSD.shape
        index_BHSD = from_BS[:, None, :, None].expand(-1, heads, -1, size)
        storage_BHSD[:, :, : from_BS.shape[1]] = storage_BHSD.gather(2, index_BHSD)
