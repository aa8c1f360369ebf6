"""SmolLM3: text alone, so only output tokens (and prompt tokens) are dropped."""

from dynamic_llava.families.base import TEXT as FAMILY

__all__ = ["FAMILY"]
