"""A pass with a K/V cache: prefill, a new turn, or one decoded token.

Legend: B batch, N tokens fed, L tokens kept, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dynamic_llava.core import masks
from dynamic_llava.core.attention.probe import Probe
from dynamic_llava.core.cache import SparseCache
from dynamic_llava.core.passes.base import Inputs, Pass, Tokens, keep_only
from dynamic_llava.core.placeholders import but_last
from dynamic_llava.core.report import Step
from dynamic_llava.methods import EvictingPolicy

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
        self.valid_BN: Tensor | None = None
        self.keep_B: Tensor | None = None
        self.valid_BL: Tensor | None = None
        self.stays_BL: Tensor | None = None
        self.evicting: EvictingPolicy | None = None
        self.mass: Probe | None = None

    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Open the dense stage of the cache."""
        batch, length, _ = hidden_BNC.shape
        dense = self.cache.dense
        self.is_new_turn = dense.used > 0
        self.is_decode = length == 1 and self.is_new_turn
        if not self.is_decode:
            past = int(self.cache.get_seq_length())
            self.columns = (past, past + length)
            mask = masks.two_dimensional(self.given.attention_mask, past, length)
            self.valid_BN = masks.token_mask(mask, length)
            if self.valid_BN is not None:
                self.valid_BN = self.valid_BN.expand(batch, -1)
            if self.is_new_turn and mask is not None and mask.shape[1] != length:
                self._hide_masked(mask, past, length)
        visible = dense.open(batch, length, self.valid_BN, hidden_BNC.device)
        self.column_BN = cast(Tensor, dense.slots_BQ)  # the dense stage holds all that was fed
        return visible

    def prompt(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which tokens are no padding: what is fed in one go is a prompt."""
        if self.valid_BN is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        return self.valid_BN

    def select(self, tokens: Tokens) -> Tokens:
        """Drop image tokens of a prompt, or decide on a decoded token; open the sparse stage."""
        self.cache.dense.extend(self.valid_BN, self.column_BN)
        if self.is_decode:
            self._decide(tokens.hidden_BNC)
            selected = tokens
        else:
            selected = self._prune(tokens)
        batch, length, _ = selected.hidden_BNC.shape
        selected.visible = self.cache.sparse.open(batch, length, self.valid_BL, selected.hidden_BNC.device)
        if self.evicting is not None:
            selected.probe = self.mass = self._mass(selected)
        return selected

    def close(self) -> SparseCache:
        """Grow the sparse stage by what stays."""
        if self.evicting is not None and self.mass is not None:
            weights_BS = cast(Tensor, self.mass.weights_BS)
            self.cache.evict(self.evicting, weights_BS, self.column_BN)
        elif self.keep_B is None:
            self.cache.sparse.extend(self.stays_BL, self.column_BN)
        else:
            self.cache.sparse.keep(self.keep_B, self.column_BN)
        self.report.end_pass()
        return self.cache

    def _hide_masked(self, mask: Tensor, past: int, length: int) -> None:
        """Hide what a new turn's mask takes back, such as the padding that ``generate`` fed after </s>."""
        if mask.shape[1] != past + length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns: {past} tokens were fed before and {length} are "
                f"new, so give {past + length}, or {length} for the new ones alone"
            )
        seen_BN = mask[:, :past].bool()
        for stage in (self.cache.dense, self.cache.sparse):
            stage.hide(seen_BN)

    def _decide(self, hidden_B1C: Tensor) -> None:
        """Decide whether the K/V of a decoded token stays; in its own step it always takes part."""
        self.evicting = self.sparsifier.evicting
        if self.evicting is not None and self.cache.sparse.is_static:
            raise ValueError(
                f"text_policy {self.evicting.name!r} gives up earlier tokens, which a static cache cannot: "
                "leave out cache_implementation='static'"
            )
        if self.sparsifier.config.sparsify_text and self.evicting is None:
            ordinal_B1 = self.column_BN - self.cache.answer_start
            self.keep_B = self.sparsifier.keep_text_tokens(hidden_B1C, ordinal_B1)[:, 0]

    def _mass(self, tokens: Tokens) -> Probe:
        """Return what measures the attention that a decoded token pays in all sparse layers."""
        batch, device = tokens.hidden_BNC.shape[0], tokens.hidden_BNC.device
        return Probe(torch.zeros(batch, dtype=torch.long, device=device), tokens.visible, every_layer=True)

    def _prune(self, tokens: Tokens) -> Tokens:
        """Drop tokens of a prompt; what remains is aligned to the right.

        Dropped prompt tokens of a new turn still take part in this pass, and leave the cache after it.
        """
        batch, length, _ = tokens.hidden_BNC.shape
        self.cache.begin_answer()
        valid_BN = self.prompt(batch, length, tokens.hidden_BNC.device)
        image_keep_BN, prompt_keep_BN = self.keep_images(tokens), None
        if self.sparsifier.config.sparsify_prompt:
            droppable_BN = self.question(valid_BN)
            if self.is_new_turn:  # in rows without a picture all of the turn may go
                has_question_B1 = self._has_picture(batch, length)[:, None]
                droppable_BN = torch.where(has_question_B1, droppable_BN, but_last(valid_BN, valid_BN))
            prompt_keep_BN = self.keep_prompt(tokens.hidden_BNC, droppable_BN)
        enters = [image_keep_BN] if self.is_new_turn else [image_keep_BN, prompt_keep_BN]
        selected, index_BL, valid_BL = keep_only(tokens, valid_BN, enters)
        self.valid_BL = None if bool(valid_BL.all()) else valid_BL
        self.stays_BL, self.column_BN = self.valid_BL, self.column_BN.gather(1, index_BL)
        if self.is_new_turn and prompt_keep_BN is not None:
            self.stays_BL = valid_BL & prompt_keep_BN.gather(1, index_BL)
        held_BL = valid_BL if self.stays_BL is None else self.stays_BL
        self.report.add_step(Step(valid_BN.sum(-1), valid_BL.sum(-1), held_BL.sum(-1), self.columns))
        if not self.is_new_turn:
            config = self.sparsifier.config
            self.cache.plan(index_BL.shape[1], config.text_keep_rate if config.sparsify_text else 1.0)
        return selected

    def _has_picture(self, batch: int, length: int) -> Tensor:
        """Tell which rows bring a picture in this call: bool ``[B]``."""
        positions_KI = self.given.image_positions_KI
        if positions_KI is None:
            return torch.zeros(batch, dtype=torch.bool, device=self.column_BN.device)
        rows_B = torch.arange(batch, device=positions_KI.device)
        return torch.isin(rows_B, positions_KI[:, 0] // length)
