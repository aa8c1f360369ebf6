"""The end of a decoding step under a method that gives up earlier output tokens.

Legend: B batch, S slots, H heads, D head size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dynamic_llava.core.cache import Context, SparseLayer
from dynamic_llava.methods import EvictingPolicy, Held


def evict(context: Context, policy: EvictingPolicy, weights_BS: Tensor, column_B1: Tensor) -> None:
    """End a decoding step under a policy that may give up an earlier token, whose slot the new one takes.

    Parameters
    ----------
    weights_BS
        Attention that the new token paid to each used slot.
    column_B1
        Where the new token stood in what was fed.
    """
    slots = context.slots
    slots_B1 = cast(Tensor, slots.slots_BQ)
    more = weights_BS.shape[1] - context.mass_BS.shape[1]
    if context.mass_BS.shape[0] != len(weights_BS):
        context.mass_BS = torch.zeros_like(weights_BS)
    elif more > 0:
        context.mass_BS = torch.nn.functional.pad(context.mass_BS, (0, more))
    # The slot was another token's before, or never used: what it received does not count.
    mass_BS = context.mass_BS[:, : weights_BS.shape[1]].scatter(1, slots_B1, 0.0) + weights_BS
    context.mass_BS[:, : weights_BS.shape[1]] = mass_BS
    column_BS, is_held_BS = slots.seen(None)
    ordinal_BS = column_BS - context.answer_start
    victim_B = policy.evict(Held(ordinal_BS, is_held_BS & (ordinal_BS >= 0), mass_BS))
    target_B1 = torch.where(victim_B < 0, slots_B1[:, 0], victim_B)[:, None]
    for layer in context.layers:
        _move(layer, slots_B1, target_B1)
    context.mass_BS.scatter_(1, target_B1, mass_BS.gather(1, slots_B1))
    slots.keep(victim_B < 0)
    slots.place(target_B1, column_B1, victim_B != slots_B1[:, 0])


def _move(layer: SparseLayer, from_B1: Tensor, to_B1: Tensor) -> None:
    """Copy what lies in one slot of each row into another."""
    rows_B = torch.arange(layer.keys.shape[0], device=layer.keys.device)
    start_B, end_B = (slots_B1[:, 0].to(layer.keys.device) for slots_B1 in (from_B1, to_B1))
    for storage_BHSD in (layer.keys, layer.values):
        storage_BHSD[rows_B, :, end_B] = storage_BHSD[rows_B, :, start_B]
