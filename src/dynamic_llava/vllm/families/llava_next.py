"""LLaVA-NeXT in vLLM: all tokens of a picture, of its small copy and its tiles, are chosen from together."""

from __future__ import annotations

from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

from dynamic_llava.vllm.model import TOWER_NAMES, SparseModel


class Sparse(SparseModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT with a sparse decoder."""

    stock = LlavaNextForConditionalGeneration
    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
