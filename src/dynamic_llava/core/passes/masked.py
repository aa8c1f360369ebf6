"""A pass at full length, in which policies weigh or hide keys: training and teacher forcing.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamic_llava.core import masks
from dynamic_llava.core.attention.interface import KeyWeights
from dynamic_llava.core.passes.base import Inputs, Pass, Tokens
from dynamic_llava.core.report import Report
from dynamic_llava.core.view import ordinals

if TYPE_CHECKING:
    from dynamic_llava.sparsifier import Sparsifier


class MaskedPass(Pass):
    """Full length, nothing removed: policies weigh keys (training, teacher forcing)."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        report: Report,
        given: Inputs,
        answer_mask_BN: Tensor,
        prompt_mask_BN: Tensor | None,
    ) -> None:
        super().__init__(sparsifier, report, given)
        self.answer_mask_BN = answer_mask_BN.bool()
        self.prompt_mask_BN = None if prompt_mask_BN is None else prompt_mask_BN.bool()

    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Return who sees whom; every token at least itself."""
        batch, length, _ = hidden_BNC.shape
        for name, mask_BN in (("answer_mask", self.answer_mask_BN), ("prompt_mask", self.prompt_mask_BN)):
            if mask_BN is not None and mask_BN.shape != (batch, length):
                raise ValueError(f"{name} is {tuple(mask_BN.shape)}, not [batch, tokens] = {(batch, length)}")
        if self.sparsifier.config.sparsify_prompt and self.prompt_mask_BN is None:
            raise ValueError(
                "sparsify_prompt is on: also pass prompt_mask, bool [batch, tokens], True at the prompt "
                "tokens that may be dropped"
            )
        attention_mask = self.given.attention_mask
        self.visible = masks.with_diagonal(masks.visibility(attention_mask, length, hidden_BNC.device))
        return self.visible

    def prompt(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which tokens stand before the first output token.

        Raises
        ------
        ValueError
            If that is not all there is to a row's prompt: pictures come later, or rows are packed.
        """
        attention_mask, positions_KI = self.given.attention_mask, self.given.image_positions_KI
        is_before_BN = self.answer_mask_BN.long().cumsum(-1) == 0
        is_packed = attention_mask is not None and attention_mask.ndim == 4
        if is_packed or (positions_KI is not None and not is_before_BN.flatten()[positions_KI].all()):
            raise ValueError(
                f"image_policy {self.sparsifier.config.image_policy!r} ranks by the last prompt token: with "
                "answer_mask give one turn a row, its picture before the answer, and a 2-D attention_mask"
            )
        valid_BN = None if attention_mask is None else masks.token_mask(attention_mask, length)
        return is_before_BN if valid_BN is None else is_before_BN & valid_BN

    def select(self, tokens: Tokens) -> Tokens:
        """Keep all tokens; weigh or hide the keys of dropped ones."""
        decide = self._train if self.sparsifier.training else self._evaluate
        return decide(tokens)

    def _train(self, tokens: Tokens) -> Tokens:
        """Weigh keys by straight-through Gumbel masks."""
        policy_BN = self.sparsifier.training_policy(
            tokens.hidden_BNC,
            self.given.image_positions_KI,
            self.answer_mask_BN,
            self.prompt_mask_BN,
            self.attention(tokens),
            self.report,
        )
        config = self.sparsifier.config
        weights = KeyWeights(policy_BN, config.softmax_eps, config.dropped_key_bound, config.masked_softmax)
        return Tokens(tokens.hidden_BNC, tokens.position_ids, tokens.visible, weights)

    def _evaluate(self, tokens: Tokens) -> Tokens:
        """Hide dropped keys from later queries, as in step-by-step decoding."""
        keep_BN = torch.ones_like(self.answer_mask_BN)
        image_keep_BN = self.keep_images(tokens)
        if image_keep_BN is not None:
            keep_BN = keep_BN & image_keep_BN
        if self.sparsifier.config.sparsify_text:
            text_keep_BN = self.sparsifier.keep_text_tokens(tokens.hidden_BNC, ordinals(self.answer_mask_BN))
            keep_BN = torch.where(self.answer_mask_BN, text_keep_BN, keep_BN)
        self.report.add_text(keep_BN, self.answer_mask_BN)
        if self.sparsifier.config.sparsify_prompt and self.prompt_mask_BN is not None:
            keep_BN = keep_BN & self.keep_prompt(tokens.hidden_BNC, self.prompt_mask_BN)
        visible = masks.with_diagonal(self.visible & keep_BN[:, None, None, :])
        return Tokens(tokens.hidden_BNC, tokens.position_ids, visible)
