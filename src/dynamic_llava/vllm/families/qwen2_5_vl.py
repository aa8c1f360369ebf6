"""Qwen2.5-VL in vLLM: positions of three axes go with their tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from dynamic_llava.vllm.model import SparseModel


class Sparse(SparseModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL with a sparse decoder."""

    stock = Qwen2_5_VLForConditionalGeneration
