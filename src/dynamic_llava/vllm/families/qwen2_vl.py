"""Qwen2-VL in vLLM: positions of three axes go with their tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

from dynamic_llava.vllm.model import SparseModel


class Sparse(SparseModel, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL with a sparse decoder."""

    stock = Qwen2VLForConditionalGeneration
