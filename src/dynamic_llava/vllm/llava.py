"""LLaVA-1.5 in vLLM."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from dynamic_llava.vllm.model import SparseModel

TOWER = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")


@MULTIMODAL_REGISTRY.register_processor(
    _build_llava_or_pixtral_hf_processor,
    info=_build_llava_or_pixtral_hf_info,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class SparseLlava(SparseModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA with a sparse decoder."""

    stock = LlavaForConditionalGeneration

    # vLLM knows the names that transformers gave a tower before its version 5.
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={f"vision_tower.{part}": f"vision_tower.vision_model.{part}" for part in TOWER}
    )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Return the last hidden states, ``[N, C]``."""
        if inputs_embeds is None:
            decoder = self.language_model.model
            inputs_embeds = decoder.embed_input_ids(input_ids)
        return self.sparse(inputs_embeds, positions)
