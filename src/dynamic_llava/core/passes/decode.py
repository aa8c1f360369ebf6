"""A pass of one decoded token with a K/V cache.

Legend: B batch, S slots, C channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dynamic_llava.core.attention.probe import Probe
from dynamic_llava.core.cache import Context
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.passes.base import Given, Pass
from dynamic_llava.core.view import MASK, View, seen_by


class DecodePass(Pass):
    """Decide whether the K/V of a decoded token stays; in its own step it always takes part."""

    def __init__(self, decisions: Decisions, context: Context, given: Given, is_flash: bool) -> None:
        super().__init__(decisions, context.report, given, is_flash)
        self.context = context
        self.evicting = decisions.evicting
        self.keep_B: Tensor | None = None
        self.mass: Probe | None = None
        if self.evicting is not None and context.slots.is_static:
            raise ValueError(
                f"text_policy {self.evicting.name!r} gives up earlier tokens, which a static cache cannot: "
                "leave out cache_implementation='static'"
            )

    @property
    def needs_attention(self) -> bool:
        """Whether earlier tokens are given up by the attention that they receive."""
        return self.evicting is not None

    def begin(self, batch: int, length: int) -> None:
        """Open the cache for the pass."""
        self.context.begin(batch)

    def prompt(self, mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """Return that no token belongs to a prompt."""
        return torch.zeros(batch, length, dtype=torch.bool, device=device)

    def select(self, hidden_BNC: Tensor, mask: Any) -> Tensor:
        """Decide on the token, and give it the slot that the next one gets if it does not stay."""
        slots, decisions = self.context.slots, self.decisions
        self.column_B1 = _column(slots.fed, len(hidden_BNC), hidden_BNC.device)
        if decisions.config.sparsify_text and self.evicting is None:
            ordinal_B1 = self.column_B1 - self.context.answer_start
            self.keep_B = decisions.keep_text_tokens(hidden_BNC, ordinal_B1)[:, 0]
        slots.open(self.column_B1)
        sees_all = slots.sees_all
        if sees_all and mask is None:
            column_BS, valid_BS = slots.column_BS, slots.valid_BS  # nobody looks at them
        else:
            column_BS, valid_BS = slots.seen(None)
        self.view = View(1, slots.fed, column_BS, valid_BS, sees_all=sees_all, is_flash=self.is_flash)
        return hidden_BNC

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Exchange the mask, which is all that changes; add what measures attention where it is asked for."""
        if MASK in kwargs:
            kwargs[MASK] = self.view.mask(kwargs[MASK])
        if self.evicting is not None:
            if self.mass is None:
                query_B = torch.zeros(len(self.column_B1), dtype=torch.long, device=self.column_B1.device)
                self.mass = Probe(query_B, seen_by(kwargs.get(MASK), query_B, 1))
            kwargs["probe"] = self.mass
        return args, kwargs

    def close(self) -> None:
        """Grow the slots by what stays."""
        context = self.context
        if self.evicting is not None and self.mass is not None:
            context.evict(self.evicting, cast(Tensor, self.mass.weights_BS), self.column_B1)
        elif self.keep_B is None:
            context.slots.extend(None)
        else:
            context.slots.keep(self.keep_B)
        context.slots.count(1)
        context.is_busy = False
        super().close()


def _column(fed: Any, batch: int, device: torch.device) -> Tensor:
    """Return the column of the new token in each row, int64 ``[B, 1]``; ``fed`` may be a tensor."""
    if isinstance(fed, Tensor):
        return fed.expand(batch, 1)
    return torch.full((batch, 1), fed, dtype=torch.long, device=device)
