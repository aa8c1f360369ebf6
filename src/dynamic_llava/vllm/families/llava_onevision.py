"""LLaVA-OneVision in vLLM, with pictures alone."""

from __future__ import annotations

from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from dynamic_llava.vllm.model import TOWER_NAMES, SparseModel


class Sparse(SparseModel, LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision with a sparse decoder."""

    stock = LlavaOnevisionForConditionalGeneration
    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
