"""A pass with a K/V cache: prefill, a new turn, or one decoded token.

Legend: B batch, N tokens fed, L tokens kept, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamic_llava import masks
from dynamic_llava.cache import SparseCache
from dynamic_llava.passes.base import Inputs, Pass, Tokens, keep_only
from dynamic_llava.placeholders import but_last
from dynamic_llava.report import Step

if TYPE_CHECKING:
    from dynamic_llava.sparsifier import Sparsifier


class CachedPass(Pass):
    """Prefill, a new turn, or one decoded token, with a K/V cache."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        given: Inputs,
        cache: SparseCache,
    ) -> None:
        super().__init__(sparsifier, cache.report, given)
        self.cache: SparseCache = cache
        self.keep_B: Tensor | None = None
        self.valid_BL: Tensor | None = None
        self.stays_BL: Tensor | None = None

    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Open the dense stage of the cache."""
        batch, length, _ = hidden_BNC.shape
        self.is_decode = length == 1 and self.cache.dense.used > 0
        self.valid_BN = None if self.is_decode else masks.token_mask(self.given.attention_mask, length)
        return self.cache.dense.open(batch, length, self.valid_BN, hidden_BNC.device)

    def select(self, tokens: Tokens) -> Tokens:
        """Drop image tokens of a prompt, or decide on a decoded token; open the sparse stage."""
        self.cache.dense.extend(self.valid_BN)
        selected = self._decide(tokens) if self.is_decode else self._prune(tokens)
        batch, length, _ = selected.hidden_BNC.shape
        selected.visible = self.cache.sparse.open(batch, length, self.valid_BL, selected.hidden_BNC.device)
        return selected

    def close(self) -> SparseCache:
        """Grow the sparse stage by what stays."""
        if self.keep_B is None:
            self.cache.sparse.extend(self.stays_BL)
        else:
            self.cache.sparse.keep(self.keep_B)
        self.report.add_step(self.step)
        return self.cache

    def _decide(self, tokens: Tokens) -> Tokens:
        """Decide whether the K/V of a decoded token stays; in its own step it always takes part."""
        batch = tokens.hidden_BNC.shape[0]
        ordinal_B1 = torch.full((batch, 1), self.cache.answered, device=tokens.hidden_BNC.device)
        self.cache.answered += 1
        one_B = torch.ones_like(ordinal_B1[:, 0])
        keep_B1 = one_B[:, None].bool()
        if self.sparsifier.config.sparsify_text:
            keep_B1 = self.sparsifier.keep_text_tokens(tokens.hidden_BNC, ordinal_B1)
            self.keep_B = keep_B1[:, 0]
        self.report.add_text(keep_B1)
        self.step = Step(one_B, one_B, keep_B1[:, 0].long())
        return tokens

    def _prune(self, tokens: Tokens) -> Tokens:
        """Drop tokens of a prompt; what remains is aligned to the right.

        Dropped prompt tokens of a new turn still take part in this pass, and leave the cache after it.
        """
        batch, length, _ = tokens.hidden_BNC.shape
        self.cache.answered = 0
        is_new_turn = self.cache.sparse.used > 0
        all_BN = torch.ones(batch, length, dtype=torch.bool, device=tokens.hidden_BNC.device)
        valid_BN = all_BN if self.valid_BN is None else self.valid_BN
        image_keep_BN, prompt_keep_BN = self.keep_images(tokens.hidden_BNC), None
        if self.sparsifier.config.sparsify_prompt:
            whole_turn = is_new_turn and self.given.image_positions_KI is None
            droppable_BN = but_last(valid_BN, valid_BN) if whole_turn else self.question(valid_BN)
            prompt_keep_BN = self.keep_prompt(tokens.hidden_BNC, droppable_BN)
        enters = [image_keep_BN] if is_new_turn else [image_keep_BN, prompt_keep_BN]
        selected, index_BL, valid_BL = keep_only(tokens, valid_BN, enters)
        self.valid_BL = None if bool(valid_BL.all()) else valid_BL
        self.stays_BL = self.valid_BL
        if is_new_turn and prompt_keep_BN is not None:
            self.stays_BL = valid_BL & prompt_keep_BN.gather(1, index_BL)
        held_BL = valid_BL if self.stays_BL is None else self.stays_BL
        self.step = Step(valid_BN.sum(-1), valid_BL.sum(-1), held_BL.sum(-1))
        return selected
