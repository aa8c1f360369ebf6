"""A pass of one decoded token with a K/V cache.

Legend: B batch, S slots, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamic_llava.core.cache import Context
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.passes.base import Given, Pass
from dynamic_llava.core.view import View


class DecodePass(Pass):
    """Decide whether the K/V of a decoded token stays; in its own step it always takes part."""

    def __init__(self, decisions: Decisions, context: Context, given: Given, is_flash: bool) -> None:
        super().__init__(decisions, context.record, given, is_flash)
        self.context = context

    def begin(self, batch: int, length: int) -> None:
        """Open the cache for the pass."""
        self.context.begin(batch)

    def prompt(self, mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """Return that no token belongs to a prompt."""
        return torch.zeros(batch, length, dtype=torch.bool, device=device)

    def select(self, hidden_BNC: Tensor, mask: Any) -> Tensor:
        """Decide on the token, and give it the slot that the next one gets if it does not stay."""
        slots = self.context.slots
        self.column_B1 = _column(slots.fed, len(hidden_BNC), hidden_BNC.device)
        self.keep_B = self.decide(hidden_BNC)
        slots.open(self.column_B1)
        if (sees_all := slots.sees_all) and mask is None:
            column_BS, valid_BS = slots.column_BS, slots.valid_BS  # nobody looks at them
        else:
            column_BS, valid_BS = slots.seen(None)
        self.view = View(
            1,
            slots.fed,
            column_BS,
            valid_BS,
            sees_all=sees_all,
            is_flash=self.is_flash,
            columns=slots.columns,
        )
        return hidden_BNC

    def decide(self, hidden_B1C: Tensor) -> Tensor | None:
        """Return whether the token of each row stays, bool ``[B]``; None where all do."""
        if not self.decisions.config.sparsify_text:
            return None
        ordinal_B1 = self.column_B1 - self.context.slots.answer_start
        return self.decisions.keep_text_tokens(hidden_B1C, ordinal_B1)[:, 0]

    def settle(self) -> None:
        """Keep the token, or let the next one take its slot."""
        if self.keep_B is None:
            self.context.slots.extend(None)
        else:
            self.context.slots.keep(self.keep_B)

    def close(self) -> None:
        """Grow the slots by what stays."""
        self.settle()
        self.context.slots.note(self.given.token_ids_BN)
        self.context.slots.count(1)
        self.context.is_busy = False
        super().close()


def _column(fed: Any, batch: int, device: torch.device) -> Tensor:
    """Return the column of the new token in each row, int64 ``[B, 1]``; ``fed`` may be a tensor."""
    if isinstance(fed, Tensor):
        return fed.expand(batch, 1)
    return torch.full((batch, 1), fed, dtype=torch.long, device=device)
