"""Qwen3: a decoder of text; its output tokens are dropped."""

from dynamic_llava.families.base import TEXT as FAMILY

__all__ = ["FAMILY"]
