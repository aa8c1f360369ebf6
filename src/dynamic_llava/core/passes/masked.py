"""A pass at full length, in which policies weigh or hide keys: training and teacher forcing.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from dynamic_llava.config import SparsityConfig
from dynamic_llava.core import masks
from dynamic_llava.core.attention.interface import KeyWeights
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.passes.base import Given, Pass
from dynamic_llava.core.question import keep_question
from dynamic_llava.core.record import Record
from dynamic_llava.core.sampled import RecordedNoise, Sampled, sample
from dynamic_llava.core.spans import ordinals
from dynamic_llava.core.view import MASK


class MaskedPass(Pass):
    """Full length, nothing removed: keys are weighed in training, and hidden otherwise."""

    def __init__(self, decisions: Decisions, record: Record, given: Given, is_flash: bool) -> None:
        super().__init__(decisions, record, given, is_flash)
        self.answer_mask_BN = cast(Tensor, given.answer_mask_BN).bool()
        self.prompt_mask_BN = None if given.prompt_mask_BN is None else given.prompt_mask_BN.bool()
        if decisions.config.sparsify_prompt and self.prompt_mask_BN is None:
            raise ValueError(
                "sparsify_prompt is on: also pass prompt_mask, bool [batch, tokens], True at the prompt "
                "tokens that may be dropped"
            )
        self.noise = RecordedNoise(decisions.noise)
        self.sampled: Sampled | None = None
        self.keep_BN = self.answer_mask_BN
        self._masks: list[tuple[Any, Any]] = []

    @property
    def weighs(self) -> bool:
        """Whether keys are weighed: a 2-D mask cannot hide them from all but their own query."""
        return self.decisions.training or self.is_flash

    @property
    def needs_attention(self) -> bool:
        """Whether it asks more of the attention of the layers than the stock function gives."""
        return self.weighs or self.needs_ranking

    def begin(self, batch: int, length: int) -> None:
        """Check that the masks are of this size."""
        for name, mask_BN in (("answer_mask", self.answer_mask_BN), ("prompt_mask", self.prompt_mask_BN)):
            if mask_BN is not None and mask_BN.shape != (batch, length):
                raise ValueError(f"{name} is {tuple(mask_BN.shape)}, not [batch, tokens] = {(batch, length)}")

    def prompt(self, mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which tokens stand before the first output token.

        Raises
        ------
        ValueError
            If that is not all there is to a row's prompt: pictures come later, or rows are packed.
        """
        pictures = self.given.pictures
        is_before_BN = self.answer_mask_BN.long().cumsum(-1) == 0
        is_packed = getattr(self.given.attention_mask, "ndim", 2) == 4
        if is_packed or not is_before_BN.flatten()[torch.cat(list(pictures))].all():
            raise ValueError(
                f"image_policy {self.decisions.config.image_policy!r} ranks by the last prompt token: with "
                "answer_mask give one turn a row, its picture before the answer, and a 2-D attention_mask"
            )
        return is_before_BN & self.valid(mask, batch, length, device)

    def select(self, hidden_BNC: Tensor, mask: Any) -> Tensor:
        """Keep all tokens; decide what their keys weigh."""
        decide = self._sample if self.decisions.training else self._decide
        decide(hidden_BNC)
        return hidden_BNC

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Exchange the mask for what a weighing attention takes, or for one that hides what is dropped."""
        kwargs[MASK] = self._mask(kwargs.get(MASK))
        if self.weighs:
            kwargs["key_weights"] = self.key_weights
        return args, kwargs

    def _mask(self, mask: Any) -> Any:
        for seen, made in self._masks:
            if seen is mask:
                return made
        batch, length = self.keep_BN.shape
        if self.weighs:
            made = masks.visible(mask, batch, length, self.keep_BN.device)
        else:
            made = masks.hide(mask, self.keep_BN)
        self._masks.append((mask, made))
        return made

    def _weights(self, policy_BN: Tensor) -> KeyWeights:
        config = self.decisions.config
        return KeyWeights(policy_BN, config.softmax_eps, config.dropped_key_bound, config.masked_softmax)

    def _sample(self, hidden_BNC: Tensor) -> None:
        """Weigh keys by straight-through Gumbel masks.

        Gradient checkpointing in older versions of transformers runs this again in the backward pass: it must
        do the same work, on the same noise.
        """
        self.noise.rewind()
        sampled = sample(
            self.decisions,
            hidden_BNC,
            self.given.pictures,
            self.answer_mask_BN,
            self.prompt_mask_BN,
            self.attention,
            self.noise,
        )
        self.key_weights = self._weights(sampled.key_weights_BN())
        if self.sampled is None:
            self.sampled = sampled
            self.decisions.remember(self.record, sampled)

    def _decide(self, hidden_BNC: Tensor) -> None:
        """Hide dropped keys from later queries, as in step-by-step decoding."""
        answer_mask_BN, config = self.answer_mask_BN, self.decisions.config
        keep_BN = torch.ones_like(answer_mask_BN)
        image_keep_BN = self.keep_images(hidden_BNC)
        if image_keep_BN is not None:
            keep_BN = keep_BN & image_keep_BN
        if config.sparsify_text:
            text_keep_BN = self.decisions.keep_text_tokens(hidden_BNC, ordinals(answer_mask_BN))
            keep_BN = torch.where(answer_mask_BN, text_keep_BN, keep_BN)
        self.record.add_text(keep_BN, answer_mask_BN)
        if config.sparsify_prompt and self.prompt_mask_BN is not None:
            keep_BN = keep_BN & keep_question(self, hidden_BNC, self.prompt_mask_BN)
        self.keep_BN = keep_BN
        self.key_weights = self._weights(keep_BN.float())


def refuse_without_mask(config: SparsityConfig) -> None:
    """Raise ``ValueError`` if a call with labels, or in training, needs an answer mask."""
    if config.sparsify_image or config.sparsify_text or config.sparsify_prompt:
        raise ValueError(
            "labels and training need a full-length pass: also pass answer_mask, bool [batch, "
            "tokens], True at the output tokens that may be dropped (all False where none may)"
        )


def at_full_length(
    kwargs: dict[str, Any], cache: Cache | None, implementation: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of a masked pass: without a cache, and with a mask that the layers take."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("answer_mask asks for a pass at full length: give all tokens and no past_key_values")
    kwargs = {name: None if value is cache else value for name, value in kwargs.items()}
    mask = kwargs.get(MASK)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        kwargs[MASK] = _packed(mask, implementation, dtype)
    return kwargs | {"use_cache": False}


def refuse_reentrant(layer: nn.Module) -> None:
    """Raise ``ValueError`` under a gradient checkpointing that loses the gradient of the masks."""
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    options = getattr(checkpoint, "keywords", {})
    if getattr(layer, "gradient_checkpointing", False) and options.get("use_reentrant"):
        raise ValueError(
            "reentrant gradient checkpointing loses the gradient of the masks: call "
            "model.gradient_checkpointing_enable({'use_reentrant': False})"
        )


def _packed(mask_B1NN: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Return a 4-D mask, which stock code hands on as it is, as the attention takes it."""
    if mask_B1NN.dtype != torch.bool or mask_B1NN.shape[-1] != mask_B1NN.shape[-2]:
        raise ValueError(
            f"attention_mask is {mask_B1NN.dtype} {tuple(mask_B1NN.shape)}: a 4-D mask must be bool "
            "[batch, 1, tokens, tokens], True where a query sees a key"
        )
    if implementation == "sdpa":
        return mask_B1NN
    if implementation != "eager":
        raise ValueError(f"a 4-D attention_mask needs sdpa or eager attention, not {implementation}")
    additive = torch.zeros_like(mask_B1NN, dtype=dtype)
    return additive.masked_fill_(~mask_B1NN, torch.finfo(dtype).min)
