"""Dynamic-LLaVA: multimodal models that keep only the image tokens and output tokens that matter."""

from __future__ import annotations

from dynamic_llava.checkpoints import load, load_model
from dynamic_llava.config import SparsityConfig
from dynamic_llava.sparsifier import Sparsifier

__all__ = ["Sparsifier", "SparsityConfig", "load", "load_model"]
