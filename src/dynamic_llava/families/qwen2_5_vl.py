"""Qwen2.5-VL: pictures and videos as in Qwen2-VL."""

from dynamic_llava.families.qwen2_vl import FAMILY

__all__ = ["FAMILY"]
