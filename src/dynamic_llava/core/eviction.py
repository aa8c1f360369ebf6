"""A decoded token under a method that gives up earlier output tokens, whose slots the new ones take.

Legend: B batch, S slots, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dynamic_llava.core.attention.probe import Probe
from dynamic_llava.core.cache import Context, SparseLayer
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.masks import seen_by
from dynamic_llava.core.passes.base import Given
from dynamic_llava.core.passes.decode import DecodePass
from dynamic_llava.core.view import MASK
from dynamic_llava.methods.base import EvictingMethod, Held


class EvictingPass(DecodePass):
    """Measure the attention that a decoded token pays in all sparse layers; then one token may go."""

    needs_attention = True

    def __init__(self, decisions: Decisions, context: Context, given: Given, is_flash: bool) -> None:
        super().__init__(decisions, context, given, is_flash)
        self.method = cast(EvictingMethod, decisions.evicting)
        self.probe: Probe | None = None
        if context.slots.is_static:
            raise ValueError(
                f"text_policy {decisions.config.text_policy!r} gives up earlier tokens, which a static "
                "cache cannot: "
                "leave out cache_implementation='static'"
            )

    def decide(self, hidden_B1C: Tensor) -> None:
        """Decide nothing yet."""

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Exchange the mask, and add the probe."""
        args, kwargs = super().arguments(args, kwargs)
        if self.probe is None:
            query_B = torch.zeros(len(self.column_B1), dtype=torch.long, device=self.column_B1.device)
            self.probe = Probe(query_B, seen_by(kwargs.get(MASK), query_B, 1))
        return args, kwargs | {"probe": self.probe}

    def settle(self) -> None:
        """Give up the token that the method names, and let the new one take its slot."""
        context, slots = self.context, self.context.slots
        weights_BS = cast(Tensor, cast(Probe, self.probe).weights_BS)
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
        ordinal_BS = column_BS - slots.answer_start
        held = Held(ordinal_BS, is_held_BS & (ordinal_BS >= 0), mass_BS, weights_BS)
        victim_B = self.method.evict(held, self.decisions.config.text_keep_rate)
        if (ids_B1 := self.given.token_ids_BN) is not None and len(ids_B1) > 1:
            # A finished row is fed padding: it must push nobody out.
            is_over_B = self.record.ends.is_over(ids_B1[:, 0])
            victim_B = torch.where(is_over_B, slots_B1[:, 0], victim_B)
        target_B1 = torch.where(victim_B < 0, slots_B1[:, 0], victim_B)[:, None]
        for layer in context.layers:
            _move(layer, slots_B1, target_B1)
        context.mass_BS.scatter_(1, target_B1, mass_BS.gather(1, slots_B1))
        is_held_B1 = victim_B[:, None] != slots_B1
        slots.keep(victim_B < 0)
        slots.column_BS.scatter_(1, target_B1, self.column_B1)
        slots.valid_BS.scatter_(1, target_B1, is_held_B1)


def _move(layer: SparseLayer, from_B1: Tensor, to_B1: Tensor) -> None:
    """Copy what lies in one slot of each row into another."""
    rows_B = torch.arange(layer.keys.shape[0], device=layer.keys.device)
    start_B, end_B = (slots_B1[:, 0].to(layer.keys.device) for slots_B1 in (from_B1, to_B1))
    for storage_BHSD in (layer.keys, layer.values):
        storage_BHSD[rows_B, :, end_B] = storage_BHSD[rows_B, :, start_B]
