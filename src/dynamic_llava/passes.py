"""The modes of a decoder's pass: cached, without cache, and masked at full length.

Each mode is one class with the same three methods: ``open`` gives the mask of the dense layers, ``select``
what enters the sparse layers, ``close`` ends the pass. ``select`` is the only place where tokens are dropped.

Legend: B batch, K pictures, I image tokens, N tokens fed, L tokens kept, T output tokens, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynamic_llava import masks
from dynamic_llava.cache import SparseCache
from dynamic_llava.report import Report, Step
from dynamic_llava.selection import gather_tokens, right_align

if TYPE_CHECKING:
    from dynamic_llava.sparsifier import Sparsifier


@dataclass
class Tokens:
    """What flows into a stage of the decoder.

    ``visible`` is bool ``[B, 1, N, S]`` or None (plain causal); ``policy_BN`` weighs keys, or None.
    """

    hidden_BNC: Tensor
    position_ids: Tensor
    visible: Tensor | None
    policy_BN: Tensor | None = None


@dataclass(frozen=True)
class PromptState:
    """What decoding without a cache must remember; ``generate()`` hands it back as ``past_key_values``."""

    length: int
    report: Report

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: there are no keys, and all rows share the prompt's length."""


class Pass(ABC):
    """One mode of the decoder's pass.

    Parameters
    ----------
    sparsifier
        Makes the decisions.
    image_positions_KI
        Where the tokens of each picture lie in the flattened ``[B * N]`` input; None without pictures.
    """

    cache: SparseCache | None = None

    def __init__(self, sparsifier: Sparsifier, report: Report, image_positions_KI: Tensor | None) -> None:
        self.sparsifier = sparsifier
        self.report = report
        self.image_positions_KI = image_positions_KI

    @abstractmethod
    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Return who sees whom in the dense layers."""

    @abstractmethod
    def select(self, tokens: Tokens) -> Tokens:
        """Return what enters the sparse layers."""

    def close(self) -> Any:
        """End the pass; return what the caller gets as ``past_key_values``."""
        return None

    def keep_images(self, hidden_BNC: Tensor) -> Tensor | None:
        """Decide on the image tokens; return a bool ``[B, N]``, or None where nothing is dropped."""
        if self.image_positions_KI is None:
            return None
        batch, length, _ = hidden_BNC.shape
        hidden_KIC = hidden_BNC.flatten(0, 1)[self.image_positions_KI]
        kept_KI, scores_KI = self.sparsifier.keep_image_tokens(hidden_KIC)
        self.report.add_images((self.image_positions_KI[:, 0] // length).tolist(), batch, kept_KI, scores_KI)
        if not self.sparsifier.drops_image_tokens(kept_KI.shape[1]):
            return None
        keep_BN = torch.ones(batch * length, dtype=torch.bool, device=hidden_BNC.device)
        keep_BN[self.image_positions_KI] = kept_KI
        return keep_BN.view(batch, length)


class CachedPass(Pass):
    """Prefill, a new turn, or one decoded token, with a K/V cache."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        report: Report,
        image_positions_KI: Tensor | None,
        attention_mask: Tensor | None,
        cache: SparseCache,
    ) -> None:
        super().__init__(sparsifier, report, image_positions_KI)
        self.attention_mask = attention_mask
        self.cache: SparseCache = cache
        self.keep_B: Tensor | None = None
        self.valid_BL: Tensor | None = None

    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Open the dense stage of the cache."""
        batch, length, _ = hidden_BNC.shape
        self.is_decode = length == 1 and self.cache.dense.used > 0
        self.valid_BN = None if self.is_decode else masks.token_mask(self.attention_mask, length)
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
            self.cache.sparse.extend(self.valid_BL)
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
        """Drop image tokens of a prompt; what remains is aligned to the right."""
        batch, length, _ = tokens.hidden_BNC.shape
        self.cache.answered = 0
        keep_BN = self.keep_images(tokens.hidden_BNC)
        all_BN = torch.ones(batch, length, dtype=torch.bool, device=tokens.hidden_BNC.device)
        valid_BN = all_BN if self.valid_BN is None else self.valid_BN
        if keep_BN is None:
            self.valid_BL = self.valid_BN
            selected, held_B = tokens, valid_BN.sum(-1)
        else:
            selected, valid_BL = drop(tokens, keep_BN & valid_BN)
            held_B = valid_BL.sum(-1)
            self.valid_BL = None if bool(valid_BL.all()) else valid_BL
        self.step = Step(valid_BN.sum(-1), held_B, held_B)
        return selected


class RecomputePass(Pass):
    """Every step computes the whole sequence anew; decisions are those that a cached run makes."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        report: Report,
        image_positions_KI: Tensor | None,
        attention_mask: Tensor | None,
        prompt_length: int,
    ) -> None:
        super().__init__(sparsifier, report, image_positions_KI)
        self.attention_mask = attention_mask
        self.prompt_length = prompt_length

    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Return who sees whom, or None for plain causal attention."""
        length = hidden_BNC.shape[1]
        self.valid_BN = masks.token_mask(self.attention_mask, length)
        if self.valid_BN is None:
            return None
        return masks.visibility(self.valid_BN, length, hidden_BNC.device)

    def select(self, tokens: Tokens) -> Tokens:
        """Drop image tokens and output tokens; the newest token always stays."""
        hidden_BNC = tokens.hidden_BNC
        batch, length, _ = hidden_BNC.shape
        self.report.forget_decisions()
        all_BN = torch.ones(batch, length, dtype=torch.bool, device=hidden_BNC.device)
        valid_BN = all_BN if self.valid_BN is None else self.valid_BN
        image_keep_BN = self.keep_images(hidden_BNC)
        keep_BN = all_BN if image_keep_BN is None else image_keep_BN
        drops = image_keep_BN is not None
        if fed_back := length - self.prompt_length:
            output_BT = slice(self.prompt_length, length)
            ordinal_BT = torch.arange(fed_back, device=hidden_BNC.device).expand(batch, -1)
            keep_BT = all_BN[:, output_BT]
            if self.sparsifier.config.sparsify_text:
                keep_BT = self.sparsifier.keep_text_tokens(hidden_BNC[:, output_BT], ordinal_BT)
                keep_BN = keep_BN.clone()
                keep_BN[:, output_BT] = keep_BT
                keep_BN[:, -1] = True  # the newest token always takes part in its own step
                drops = True
            self.report.add_text(keep_BT)
        keep_BN = keep_BN & valid_BN
        self.step = Step(valid_BN.sum(-1), keep_BN.sum(-1), keep_BN.sum(-1))
        if not drops:
            return tokens
        selected, valid_BL = drop(tokens, keep_BN)
        if not bool(valid_BL.all()):
            selected.visible = masks.visibility(valid_BL, valid_BL.shape[1], hidden_BNC.device)
        return selected

    def close(self) -> PromptState:
        """Return what the next step must know."""
        self.report.add_step(self.step)
        return PromptState(self.prompt_length, self.report)


class MaskedPass(Pass):
    """Full length, nothing removed: policies weigh keys (training, teacher forcing)."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        report: Report,
        image_positions_KI: Tensor | None,
        attention_mask: Tensor | None,
        answer_mask_BN: Tensor,
    ) -> None:
        super().__init__(sparsifier, report, image_positions_KI)
        self.attention_mask = attention_mask
        self.answer_mask_BN = answer_mask_BN.bool()

    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Return who sees whom; every token at least itself."""
        batch, length, _ = hidden_BNC.shape
        if self.answer_mask_BN.shape != (batch, length):
            raise ValueError(
                f"answer_mask is {tuple(self.answer_mask_BN.shape)}, not [batch, tokens] = {(batch, length)}"
            )
        self.visible = masks.with_diagonal(masks.visibility(self.attention_mask, length, hidden_BNC.device))
        return self.visible

    def select(self, tokens: Tokens) -> Tokens:
        """Keep all tokens; weigh or hide the keys of dropped ones."""
        decide = self._train if self.sparsifier.training else self._evaluate
        return decide(tokens)

    def _train(self, tokens: Tokens) -> Tokens:
        """Weigh keys by straight-through Gumbel masks."""
        policy_BN = self.sparsifier.training_policy(
            tokens.hidden_BNC, self.image_positions_KI, self.answer_mask_BN, self.report
        )
        return Tokens(tokens.hidden_BNC, tokens.position_ids, tokens.visible, policy_BN)

    def _evaluate(self, tokens: Tokens) -> Tokens:
        """Hide dropped keys from later queries, as in step-by-step decoding."""
        keep_BN = torch.ones_like(self.answer_mask_BN)
        image_keep_BN = self.keep_images(tokens.hidden_BNC)
        if image_keep_BN is not None:
            keep_BN = keep_BN & image_keep_BN
        if self.sparsifier.config.sparsify_text:
            text_keep_BN = self.sparsifier.keep_text_tokens(tokens.hidden_BNC, ordinals(self.answer_mask_BN))
            keep_BN = torch.where(self.answer_mask_BN, text_keep_BN, keep_BN)
        self.report.add_text(keep_BN, self.answer_mask_BN)
        visible = masks.with_diagonal(self.visible & keep_BN[:, None, None, :])
        return Tokens(tokens.hidden_BNC, tokens.position_ids, visible)


def ordinals(answer_mask_BN: Tensor) -> Tensor:
    """Return the index of each answer token within its answer, int64 ``[B, N]``; meaningless elsewhere."""
    count_BN = answer_mask_BN.long().cumsum(-1)
    before_BN = count_BN.masked_fill(answer_mask_BN, 0).cummax(-1).values
    return count_BN - before_BN - 1


def drop(tokens: Tokens, keep_BN: Tensor) -> tuple[Tokens, Tensor]:
    """Remove the tokens that are not kept, aligned to the right; also return which columns are no padding."""
    batch, length = keep_BN.shape
    index_BL, valid_BL = right_align(keep_BN)
    positions = tokens.position_ids.expand(*tokens.position_ids.shape[:-2], batch, length)
    index = index_BL.expand(*positions.shape[:-1], -1)
    return Tokens(gather_tokens(tokens.hidden_BNC, index_BL), positions.gather(-1, index), None), valid_BL
