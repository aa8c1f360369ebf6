"""VipLLaVA: LLaVA-1.5 with features of several layers; every picture has as many image tokens."""

from dynamic_llava.families.llava import FAMILY

__all__ = ["FAMILY"]
