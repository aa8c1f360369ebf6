"""A pass without a cache: every step computes the whole sequence anew.

Legend: B batch, N tokens fed, L tokens kept, T output tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamic_llava.core import masks
from dynamic_llava.core.passes.base import Inputs, Pass, Tokens, keep_only
from dynamic_llava.core.report import Report, Step

if TYPE_CHECKING:
    from dynamic_llava.sparsifier import Sparsifier


@dataclass(frozen=True)
class PromptState:
    """What decoding without a cache must remember; ``generate()`` hands it back as ``past_key_values``."""

    length: int
    report: Report

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: there are no keys, and all rows share the prompt's length."""


class RecomputePass(Pass):
    """Every step computes the whole sequence anew; decisions are those that a cached run makes."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        given: Inputs,
        state: PromptState,
    ) -> None:
        super().__init__(sparsifier, state.report, given)
        self.prompt_length = state.length

    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Return who sees whom, or None for plain causal attention."""
        length = hidden_BNC.shape[1]
        self.valid_BN = masks.token_mask(self.given.attention_mask, length)
        if self.valid_BN is None:
            return None
        return masks.visibility(self.valid_BN, length, hidden_BNC.device)

    def prompt(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which tokens are neither padding nor output."""
        is_prompt_BN = (torch.arange(length, device=device) < self.prompt_length).expand(batch, -1)
        return is_prompt_BN if self.valid_BN is None else is_prompt_BN & self.valid_BN

    def select(self, tokens: Tokens) -> Tokens:
        """Drop image tokens and output tokens; the newest token always stays."""
        hidden_BNC = tokens.hidden_BNC
        batch, length, _ = hidden_BNC.shape
        self.report.forget_decisions()
        all_BN = torch.ones(batch, length, dtype=torch.bool, device=hidden_BNC.device)
        valid_BN = all_BN if self.valid_BN is None else self.valid_BN
        keeps = [self.keep_images(tokens)]
        if self.sparsifier.config.sparsify_prompt:
            prompt_BN = self.prompt(batch, length, hidden_BNC.device)
            keeps.append(self.keep_prompt(hidden_BNC, self.question(prompt_BN)))
        if fed_back := length - self.prompt_length:
            ordinal_BT = torch.arange(fed_back, device=hidden_BNC.device).expand(batch, -1)
            keep_BT = all_BN[:, self.prompt_length :]
            if self.sparsifier.config.sparsify_text:
                keep_BT = self.sparsifier.keep_text_tokens(hidden_BNC[:, self.prompt_length :], ordinal_BT)
                keep_BN = torch.cat([all_BN[:, : self.prompt_length], keep_BT], dim=1)
                keep_BN[:, -1] = True  # the newest token always takes part in its own step
                keeps.append(keep_BN)
            self.report.add_text(keep_BT)
        selected, _, valid_BL = keep_only(tokens, valid_BN, keeps)
        if not bool(valid_BL.all()):
            selected.visible = masks.visibility(valid_BL, valid_BL.shape[1], hidden_BNC.device)
        self.report.add_step(Step(valid_BN.sum(-1), valid_BL.sum(-1), valid_BL.sum(-1), (0, length)))
        return selected

    def close(self) -> PromptState:
        """Return what the next step must know."""
        self.report.end_pass()
        return PromptState(self.prompt_length, self.report)
