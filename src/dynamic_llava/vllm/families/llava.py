"""LLaVA-1.5 in vLLM."""

from __future__ import annotations

from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from dynamic_llava.vllm.model import TOWER_NAMES, SparseModel


class Sparse(SparseModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA with a sparse decoder."""

    stock = LlavaForConditionalGeneration
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
