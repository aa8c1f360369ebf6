"""Qwen3-VL with experts: pictures and videos as in Qwen3-VL."""

from dynamic_llava.families.qwen3_vl import FAMILY

__all__ = ["FAMILY"]
