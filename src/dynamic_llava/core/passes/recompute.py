"""A pass without a cache: every step computes the whole sequence anew.

Legend: B batch, N tokens fed, L tokens kept, T output tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.passes.base import Entering, Given, Pass, PromptState
from dynamic_llava.core.question import keep_question, question_mask
from dynamic_llava.core.view import View


class RecomputePass(Pass):
    """Every step computes the whole sequence anew; decisions are those that a cached run makes."""

    def __init__(self, decisions: Decisions, state: PromptState, given: Given, is_flash: bool) -> None:
        super().__init__(decisions, state.record, given, is_flash)
        self.state = state

    def prompt(self, mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which tokens are neither padding nor output."""
        is_prompt_N = torch.arange(length, device=device) < self.state.length
        return self.valid(mask, batch, length, device) & is_prompt_N

    def select(self, hidden_BNC: Tensor, mask: Any) -> Tensor:
        """Drop image tokens and output tokens; the newest token always stays."""
        batch, length, _ = hidden_BNC.shape
        self.record.forget_decisions()
        self.lengths_B = self._lengths(batch, length)
        goes_on_B = self.lengths_B == length - self.state.length
        self.record.finished = set((~goes_on_B).nonzero().flatten().tolist())
        valid_BN = self.valid(mask, batch, length, hidden_BNC.device)
        keeps = [self.keep_images(hidden_BNC)]
        if self.decisions.config.sparsify_prompt:
            prompt_BN = self.prompt(mask, batch, length, hidden_BNC.device)
            given, marker = self.given, self.decisions.config.prompt_marker
            droppable_BN = question_mask(given.token_ids_BN, given.pictures, prompt_BN, marker)
            keeps.append(keep_question(self.decisions, self.record, hidden_BNC, droppable_BN))
        if length > self.state.length:
            keeps.append(self._keep_output(hidden_BNC))
        entering = Entering.of(valid_BN, keeps)
        fed_B, counts_B = (mask.sum(-1) * goes_on_B for mask in (valid_BN, entering.valid_BL))
        self.record.add_step(fed_B, counts_B, counts_B, (0, length))
        column_BL = entering.columns(length, 0)
        self.view = View(
            length,
            0,
            column_BL,
            entering.valid_BL,
            column_BL,
            entering.index_BL,
            entering.padded_BL is None,
            self.is_flash,
        )
        return entering.gather(hidden_BNC)

    def close(self) -> PromptState:
        """Return what the next step must know."""
        super().close()
        return self.state

    def _lengths(self, batch: int, length: int) -> Tensor:
        """Return how many output tokens each row has, padding after its end left out: int64 ``[B]``."""
        ids_BN = self.given.token_ids_BN
        if ids_BN is None:
            return torch.full((batch,), length - self.state.length)
        return self.record.ends.lengths(ids_BN[:, self.state.length :])

    def _keep_output(self, hidden_BNC: Tensor) -> Tensor | None:
        """Decide on the output tokens fed back: a bool ``[B, N]``, or None where nothing is dropped."""
        batch, length, _ = hidden_BNC.shape
        start = self.state.length
        keep_BN = torch.ones(batch, length, dtype=torch.bool, device=hidden_BNC.device)
        ordinal_BT = torch.arange(length - start, device=hidden_BNC.device).expand(batch, -1)
        is_answer_BT = ordinal_BT < self.lengths_B[:, None]
        if not self.decisions.config.sparsify_text:
            self.record.add_text(keep_BN[:, start:], is_answer_BT)
            return None
        keep_BT = self.decisions.keep_text_tokens(hidden_BNC[:, start:], ordinal_BT)
        self.record.add_text(keep_BT, is_answer_BT)
        keep_BN[:, start:] = keep_BT
        keep_BN[:, -1] = True  # the newest token always takes part in its own step
        return keep_BN
