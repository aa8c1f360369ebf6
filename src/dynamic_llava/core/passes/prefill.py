"""A pass of several tokens with a K/V cache: a prompt, a part of one, or a new turn.

Legend: B batch, N tokens fed, L tokens kept, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamic_llava.core import question, turns
from dynamic_llava.core.cache import Context
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.passes.base import Entering, Given, Pass
from dynamic_llava.core.view import View


class PrefillPass(Pass):
    """Drop image tokens of a prompt; its other tokens stay, unless ``sparsify_prompt`` asks for them too."""

    def __init__(self, decisions: Decisions, context: Context, given: Given, is_flash: bool) -> None:
        super().__init__(decisions, context.record, given, is_flash)
        self.context = context
        self.past = int(context.slots.fed)
        self.is_new_turn = context.slots.used > 0

    def begin(self, batch: int, length: int) -> None:
        """Open the cache for the pass."""
        self.context.begin(batch)

    def prompt(self, mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which tokens are no padding: what is fed in one go is a prompt."""
        return self.valid(mask, batch, length, device)

    def select(self, hidden_BNC: Tensor, mask: Any) -> Tensor:
        """Drop tokens of a prompt; what remains is aligned to the right.

        Dropped prompt tokens of a new turn still take part in this pass, and leave the cache after it.
        """
        batch, length, _ = hidden_BNC.shape
        self.columns = (self.past, self.past + length)
        self.valid_BN = self.valid(mask, batch, length, hidden_BNC.device)
        image_keep_BN, prompt_keep_BN = self.keep_images(hidden_BNC), self._keep_question(hidden_BNC)
        entering = Entering.of(
            self.valid_BN, [image_keep_BN] if self.is_new_turn else [image_keep_BN, prompt_keep_BN]
        )
        self.stays_BL = padded_BL = entering.padded_BL
        if self.is_new_turn and prompt_keep_BN is not None:
            kept_BL = (
                prompt_keep_BN if entering.index_BL is None else prompt_keep_BN.gather(1, entering.index_BL)
            )
            self.stays_BL = entering.valid_BL & kept_BL
        self._record(entering)
        self._make_room(entering.valid_BL.shape[1])
        self.view = self._see(entering, padded_BL)
        return entering.gather(hidden_BNC)

    def close(self) -> None:
        """Grow the slots by what stays."""
        slots = self.context.slots
        slots.extend(self.stays_BL)
        slots.count(self.columns[1] - self.past, None if bool(self.valid_BN.all()) else self.valid_BN)
        slots.answer_start.fill_(self.columns[1])
        self.context.is_busy = False
        super().close()

    def _keep_question(self, hidden_BNC: Tensor) -> Tensor | None:
        if not self.decisions.config.sparsify_prompt:
            return None
        which = question.of_a_turn if self.is_new_turn else question.question_mask
        given, marker = self.given, self.decisions.config.prompt_marker
        droppable_BN = which(given.token_ids_BN, given.pictures, self.valid_BN, marker)
        return question.keep_question(self.decisions, self.record, hidden_BNC, droppable_BN)

    def _record(self, entering: Entering) -> None:
        held_BL = entering.valid_BL if self.stays_BL is None else self.stays_BL
        fed_B, entering_B, held_B = (mask.sum(-1) for mask in (self.valid_BN, entering.valid_BL, held_BL))
        self.record.add_step(fed_B, entering_B, held_B, self.columns)

    def _make_room(self, entering: int) -> None:
        """Plan the slots of a first pass; in a new turn, hide what its mask takes back, and pack."""
        config, slots = self.decisions.config, self.context.slots
        if not self.is_new_turn:
            self.context.plan(
                entering, self.columns[1], config.text_keep_rate if config.sparsify_text else 1.0
            )
            return
        mask = self.given.attention_mask
        if isinstance(mask, Tensor) and mask.ndim == 2:  # such as padding that was fed after an early end
            turns.hide(slots, mask[:, : self.past].bool())
        if not slots.is_even:
            turns.make_even(self.context)

    def _see(self, entering: Entering, padded_BL: Tensor | None) -> View:
        fed, slots = self.columns[1] - self.past, self.context.slots
        column_BL = entering.columns(fed, self.past)
        slots.open(column_BL)
        column_BS, valid_BS = slots.seen(padded_BL)
        sees_all = padded_BL is None and not self.is_new_turn
        return View(
            fed,
            self.past,
            column_BS,
            valid_BS,
            column_BL,
            entering.index_BL,
            sees_all,
            self.is_flash,
            slots.columns,
        )
