"""Dynamic-LLaVA: multimodal models that keep only the image tokens and output tokens that matter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamic_llava.checkpoints.load import load, load_model
    from dynamic_llava.config import SparsityConfig
    from dynamic_llava.sparsifier import Sparsifier

__all__ = ["Sparsifier", "SparsityConfig", "load", "load_model"]

_HOMES = {
    "Sparsifier": "sparsifier",
    "SparsityConfig": "config",
    "load": "checkpoints",
    "load_model": "checkpoints",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch takes seconds, and ``--help`` must not wait for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
