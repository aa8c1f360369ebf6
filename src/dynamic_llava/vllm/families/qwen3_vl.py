"""Qwen3-VL in vLLM: features of the tower are added behind its first layers, all of which are dense."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from dynamic_llava.vllm.model import SparseModel


class Sparse(SparseModel, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL with a sparse decoder."""

    stock = Qwen3VLForConditionalGeneration

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Return the last hidden states, ``[N, C]``, and set the features back, as the stock model does."""
        if inputs_embeds is None:
            return super().forward(input_ids, positions)
        tokens, stock = len(inputs_embeds), cast(Any, self)
        hidden_NC: Tensor = self.sparse(inputs_embeds, positions, stock._get_deepstack_input_embeds(tokens))
        stock._clear_deepstack_input_embeds(tokens)
        return hidden_NC
